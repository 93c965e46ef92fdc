"""What is chosen per chip beside its kernels: XLA's options and hints, each with its evidence.

An option that no card and no compiler has shown to be good is `assumed`: it stands here to be
tried (`python -m jaxtrain.bench --suite=gpu` tries each at the smallest size when time is left),
and is not applied. Kernels' tiles are in pallas_kernels/tuned/, where a card's bench writes them;
XLA's own GEMM autotuning is kept by JAX in a folder of the compile cache, and read from there.
"""

from typing import NamedTuple

import jax

HINTS = ("micro_batch_tokens", "unroll")
EVIDENCE = ("measured", "offline", "assumed")
AUTOTUNED = "xla_gpu_per_fusion_autotune_cache_dir"  # also the folder's name in the compile cache


class TuningChoice(NamedTuple):
    """One choice; what is not of HINTS is an option of XLA."""

    name: str
    value: object
    evidence: str  # of EVIDENCE: on a card, by the compiler for it with no card, or of neither
    reason: str

    @property
    def applied(self) -> bool:
        return self.evidence != "assumed"

    @property
    def is_option(self) -> bool:
        return self.name not in HINTS


_OPTIONS = (
    TuningChoice(
        "xla_gpu_enable_latency_hiding_scheduler",
        True,
        "assumed",
        "overlaps collectives with products; on one device there is nothing to overlap",
    ),
    TuningChoice(
        "xla_gpu_enable_triton_gemm",
        False,
        "assumed",
        "cuBLAS alone; XLA's autotuner already takes the faster of both",
    ),
    TuningChoice(
        "xla_gpu_graph_min_graph_size",
        1,
        "assumed",
        "short sequences of kernels too become command buffers: less host time",
    ),
)
_PLAN = "bound of gpt_124m by jaxtrain.plan, 2026-11-25: "
CHOICES = {
    "a40": (
        TuningChoice(
            "micro_batch_tokens", 32_768, "offline", _PLAN + "0.5 % higher with twice as many"
        ),
        TuningChoice("unroll", 1, "offline", _PLAN + "1.9 % lower with 2"),
        *_OPTIONS,
    ),
    "h100": (
        TuningChoice(
            "micro_batch_tokens", 32_768, "offline", _PLAN + "0.5 % higher with twice as many"
        ),
        TuningChoice("unroll", 1, "offline", _PLAN + "0.3 % lower with 2"),
        *_OPTIONS,
    ),
    "h200": _OPTIONS,
}


def choices_for(chip: str) -> tuple[TuningChoice, ...]:
    """Of a chip by its name in the chip table; none of one that nobody has looked at."""
    return CHOICES.get(chip, ())


def hint(chip: str, name: str, default):
    """A hint's value for a chip, or the default where it has none."""
    return next((c.value for c in choices_for(chip) if c.name == name and c.applied), default)


def compiler_options(chip: str) -> dict:
    """XLA's options that are applied on a chip, for compile(compiler_options=...)."""
    return {c.name: c.value for c in choices_for(chip) if c.is_option and c.applied}


def describe_tuning(platform: str, chip: str) -> list[str]:
    """Lines for the start of a run: what is applied, what is not, where GEMMs' tunings are kept."""
    if platform != "gpu":
        return []
    options = [c for c in choices_for(chip) if c.is_option]
    lines = [
        f"{c.name}={c.value} {c.evidence}{'' if c.applied else ', not applied'}: {c.reason}"
        for c in options
    ]
    cache = jax.config.jax_compilation_cache_dir
    kept = AUTOTUNED in jax.config.jax_persistent_cache_enable_xla_caches
    where = f"kept in {cache}/{AUTOTUNED}" if cache and kept else "made anew: no compile_cache"
    return [*lines, f"GEMM autotuning {where}"]

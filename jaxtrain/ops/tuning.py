"""XLA options and config defaults tuned for each chip, each with its evidence.

An option whose benefit neither a card nor the compiler has shown is `assumed`: it is not applied,
but listed so that `python -m jaxtrain.bench --suite=gpu` tries it at the smallest size if time is
left. Tile sizes are in pallas_kernels/tuned/, written by the benchmark on a card. JAX stores the
results of XLA's own GEMM autotuning in a folder of the compile cache.
"""

from typing import NamedTuple

import jax

HINTS = ("micro_batch_tokens", "unroll")
EVIDENCE = ("measured", "offline", "assumed")
AUTOTUNED = "xla_gpu_per_fusion_autotune_cache_dir"  # an XLA cache, and its folder's name


class TuningChoice(NamedTuple):
    """A tuned setting: a hint, if its name is in HINTS, else an XLA option."""

    name: str
    value: bool | int
    evidence: str  # measured on a card, offline (by compiling for it), or assumed
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
        "cuBLAS only; XLA's autotuner already chooses the faster of the two",
    ),
    TuningChoice(
        "xla_gpu_graph_min_graph_size",
        1,
        "assumed",
        "uses command buffers for short sequences of kernels too, which saves host time",
    ),
)
# With excess precision XLA leaves out a rounding to bf16 between two operations. An A40, which has
# no bf16 additions, then stores the residual stream in float32, and a Hopper the gradient of GELU,
# which one fusion rounds and sums otherwise: 2.5 % fewer bytes of gpt_124m on an H200.
_ROUND_AS_WRITTEN = TuningChoice(
    "xla_allow_excess_precision",
    False,
    "offline",
    "activations that the model rounds to bf16 are stored in bf16",
)
# XLA joins the products of keys and values, as they read the same array. Without a bias to add it
# then copies one of them out of the result: 32 us a layer of gpt_124m on an H200 (2026-11-28).
_SEPARATE_PRODUCTS = TuningChoice(
    "xla_gpu_dot_merger_threshold_mb",
    0,
    "offline",
    "bound by jaxtrain.plan on an H200 1.4 % higher for gpt_124m, 0.2 % for llama_1400m",
)
_PLAN = "bound of gpt_124m by jaxtrain.plan, 2026-11-25: "
CHOICES = {
    "a40": (
        TuningChoice(
            "micro_batch_tokens", 32_768, "offline", _PLAN + "0.5 % higher with twice as many"
        ),
        TuningChoice("unroll", 1, "offline", _PLAN + "1.9 % lower with 2"),
        _ROUND_AS_WRITTEN,
        *_OPTIONS,
    ),
    "h100": (
        TuningChoice(
            "micro_batch_tokens", 32_768, "offline", _PLAN + "0.5 % higher with twice as many"
        ),
        TuningChoice("unroll", 1, "offline", _PLAN + "0.3 % lower with 2"),
        _ROUND_AS_WRITTEN,
        _SEPARATE_PRODUCTS,
        *_OPTIONS,
    ),
    "h200": (_ROUND_AS_WRITTEN, _SEPARATE_PRODUCTS, *_OPTIONS),
}


def choices_for(chip: str) -> tuple[TuningChoice, ...]:
    """Returns the choices for a chip by its name in the chip table; () for an unknown one."""
    return CHOICES.get(chip, ())


def hint(chip: str, name: str, default: int) -> int:
    """Returns a hint's value for a chip, or the default."""
    return next((int(c.value) for c in choices_for(chip) if c.name == name and c.applied), default)


def compiler_options(chip: str) -> dict[str, bool | int]:
    """Returns the XLA options to apply on a chip, for compile(compiler_options=...)."""
    return {c.name: c.value for c in choices_for(chip) if c.is_option and c.applied}


def describe_tuning(platform: str, chip: str) -> list[str]:
    """Returns lines to print at the start of a run: each option, and where GEMM tunings are."""
    if platform != "gpu":
        return []
    options = [c for c in choices_for(chip) if c.is_option]
    lines = [
        f"{c.name}={c.value} {c.evidence}{'' if c.applied else ', not applied'}: {c.reason}"
        for c in options
    ]
    cache = jax.config.values["jax_compilation_cache_dir"]
    stored = cache and AUTOTUNED in jax.config.values["jax_persistent_cache_enable_xla_caches"]
    where = f"stored in {cache}/{AUTOTUNED}" if stored else "not stored: no compile_cache"
    return [*lines, f"GEMM autotuning {where}"]

"""Describes the processor, versions and load, and measures the peak of matrix products."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.benchmarks.timing import interleave, warm_up
from jaxtrain.ops.devices import cpu_multiplies_bf16
from pallas_kernels.result_files import find_commit

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "torch")
N = 1_024  # size of the square matrices whose product measures the peak


def describe_machine() -> dict[str, Any]:
    """Returns processor, features, cores, versions and load as a row for JSON."""
    info = Path("/proc/cpuinfo")
    fields = [line.partition(":") for line in info.read_text().split("\n")] if info.exists() else []
    values = {name.strip(): value.strip() for name, _, value in fields}
    flags = set(values.get("flags", values.get("Features", "")).split())
    versions = {"python": platform.python_version()} | dict.fromkeys(PACKAGES, "missing")
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "suite": "machine",
        "cpu": values.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
        "bf16_products": cpu_multiplies_bf16(),
        "versions": versions,
        "load_average": list(os.getloadavg()),
    }


def date_and_commit() -> dict[str, str]:
    """Returns when, and by which commit's code, something is measured."""
    return {"date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "commit": find_commit()}


def provenance() -> dict[str, Any]:
    """Returns the command, the date and the commit."""
    return {"command": sys.argv, **date_and_commit()}


def machine_text(machine: Mapping[str, Any]) -> str:
    """Returns describe_machine() as text, with a warning if the load is high."""
    versions = "  ".join(f"{name} {version}" for name, version in machine["versions"].items())
    bf16 = "has bf16 instructions" if machine["bf16_products"] else "no bf16 instructions"
    load = machine["load_average"]
    lines = [
        f"cpu       {machine['cpu']}, {machine['cores']} cores, "
        f"{' '.join(machine['features'])}: {bf16}",
        f"versions  {versions}",
        f"load      {' '.join(f'{x:.2f}' for x in load)}",
    ]
    if load[0] > 0.25 * machine["cores"]:
        lines.append(
            f"WARNING   the machine is busy (load {load[0]:.2f} on {machine['cores']} cores): wall "
            "times will be too long and ratios inaccurate"
        )
    return "\n".join(lines)


def gemm_peaks(rounds: int = 7, most_s: float = 3.0) -> dict[str, float]:
    """Returns {"jax float32": FLOP/s, ...}: the fastest of `rounds` products of N x N matrices."""
    matrices = np.random.default_rng(0).normal(size=(2, N, N)).astype(np.float32)
    # XLA uses its bf16 kernel, if the processor has the instructions, only for a float32 result.
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    variants = {}
    for dtype in ("float32", "bfloat16"):
        a, b = (jax.device_put(x, jax.devices("cpu")[0]).astype(dtype) for x in matrices)
        variants[f"jax {dtype}"] = lambda turn, a=a, b=b: product(a, b).block_until_ready()
    with contextlib.suppress(ModuleNotFoundError):
        import torch

        for dtype in ("float32", "bfloat16"):
            a, b = torch.from_numpy(matrices).to(getattr(torch, dtype))
            variants[f"torch {dtype}"] = lambda turn, a=a, b=b: a @ b
    warm_up(variants, most_s)
    samples = interleave(variants, rounds, most_s)
    return {name: 2 * N**3 / min(s.wall_s for s in taken) for name, taken in samples.items()}


def peak_for(dtype: str, peaks: Mapping[str, float]) -> float:
    """Returns the peak FLOP/s that a program of a compute type is measured against.

    A bfloat16 program may use float32 products, which are exact for bfloat16 values. So its peak is
    never below that of float32.
    """
    usable = ("float32", "bfloat16") if dtype == "bfloat16" else (dtype,)
    return max(flops for name, flops in peaks.items() if name.split()[1] in usable)


def peaks_text(peaks: Mapping[str, float]) -> str:
    """Returns the peaks as text, with a note if torch's bf16 product is slow on this processor."""
    shown = "  ".join(f"{name} {flops / 1e9:.1f}" for name, flops in peaks.items())
    text = f"GEMM peak, GFLOP/s at {N}: {shown}"
    if peaks.get("torch bfloat16", float("inf")) < 0.25 * peaks.get("torch float32", 0):
        text += (
            "\nNOTE: torch has no fast bf16 product on this processor. That slows its bfloat16 "
            "rows and\ntorch.optim.Muon, which always iterates in bf16, but not the float32 "
            "adamw rows."
        )
    return text

"""What the numbers were measured on: processor, versions, load, and its matrix-product peak."""

import importlib.metadata
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.benchmarks.timing import interleave, warm_up
from jaxtrain.ops.routes import cpu_multiplies_bf16

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "torch")
N = 1_024  # of the products that measure the peak


def describe() -> dict:
    """Processor, features, cores, versions and load, as a row for JSON."""
    info = Path("/proc/cpuinfo")
    fields = [line.partition(":") for line in info.read_text().split("\n")] if info.exists() else []
    values = {name.strip(): value.strip() for name, _, value in fields}
    flags = set(values.get("flags", values.get("Features", "")).split())
    return {
        "suite": "machine",
        "cpu": values.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
        "bf16_products": cpu_multiplies_bf16(),
        "versions": {"python": platform.python_version()} | dict(_versions()),
        "load_average": list(os.getloadavg()),
    }


def _versions():
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "missing"


def header(machine: dict) -> str:
    """`describe` as text, with a warning where the machine is not ours alone."""
    versions = "  ".join(f"{name} {version}" for name, version in machine["versions"].items())
    bf16 = "has bf16 products" if machine["bf16_products"] else "no bf16 products"
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
            "times will be too long and ratios rough. Trust the column `others`: 0 % is quiet."
        )
    return "\n".join(lines)


def _jax_product(dtype):
    cpu = jax.devices("cpu")[0]
    a, b = (jax.device_put(_square(seed), cpu).astype(dtype) for seed in (0, 1))
    # A float32 result is what reaches XLA's bf16 kernel where the processor has one.
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda turn: product(a, b).block_until_ready()


def _torch_product(torch, dtype):
    a, b = (torch.from_numpy(_square(seed)).to(dtype) for seed in (0, 1))
    return lambda turn: a @ b


def _square(seed):
    return np.random.default_rng(seed).normal(size=(N, N)).astype(np.float32)


def gemm_peaks(rounds: int = 7, most_s: float = 3.0) -> dict[str, float]:
    """{"jax float32": FLOP/s, ...}: the fastest of `rounds` products of N x N matrices."""
    variants = {f"jax {name}": _jax_product(name) for name in ("float32", "bfloat16")}
    try:
        import torch
    except ModuleNotFoundError:
        torch = None
    if torch is not None:
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            variants[f"torch {name}"] = _torch_product(torch, dtype)
    warm_up(variants, most_s)
    samples = interleave(variants, rounds, most_s)
    return {name: 2 * N**3 / min(s.wall_s for s in taken) for name, taken in samples.items()}


def peak_of(dtype: str, peaks: dict[str, float]) -> float:
    """FLOP/s to measure a program by: the fastest product that may serve this compute type.

    float32 products of bf16 values are exact, so bfloat16's peak is never below float32's.
    """
    serving = ("float32", "bfloat16") if dtype == "bfloat16" else (dtype,)
    return max(flops for name, flops in peaks.items() if name.split()[1] in serving)


def peaks_text(peaks: dict[str, float]) -> str:
    """The peaks in GFLOP/s, with a note where torch has no fast bf16 product to compete with."""
    shown = "  ".join(f"{name} {flops / 1e9:.1f}" for name, flops in peaks.items())
    text = f"GEMM peak, GFLOP/s at {N}: {shown}"
    if peaks.get("torch bfloat16", float("inf")) < 0.25 * peaks.get("torch float32", 0):
        text += (
            "\nNOTE: torch's bf16 product has no fast kernel on this processor. Its bfloat16 rows, "
            "and torch.optim.Muon's\niteration, which is always bf16, are slow for that reason; "
            "the float32 adamw rows compare like with like."
        )
    return text

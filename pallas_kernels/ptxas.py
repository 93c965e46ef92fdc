"""Recognises versions of JAX and of ptxas, NVIDIA's assembler, that cannot compile a kind of body.

ptxas of CUDA 12.8.0 to 12.9.0 miscompiles Mosaic's masked attention, for which jax's own kernel
refuses them too (jax/experimental/pallas/ops/gpu/attention_mgpu.py, jax 0.10.2).
"""

import functools
import importlib.metadata
import re
from pathlib import Path

import jax

OLDEST_JAX = (0, 11, 2)  # Mosaic GPU changes with every release
PACKAGES = ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")  # which contain the ptxas that JAX runs
FIRST_FAULTY, FIXED = (12, 8), (12, 9, 86)  # CUDA 12.9.1 has 12.9.86


def is_faulty(version: str) -> bool:
    """Returns whether a version of the packages' numbering, such as 12.9.41, miscompiles."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return FIRST_FAULTY <= numbers < FIXED


@functools.cache
def find_fault() -> str:
    """Returns why the installed ptxas must not compile Mosaic bodies; "" if nothing speaks against.

    Where no package of PACKAGES is installed, JAX uses another ptxas, whose version is not known.
    """
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if is_faulty(version):
            return (
                f"{package} {version} miscompiles Mosaic's masked attention. Run pip install "
                f"'{package}>=12.9.86'"
            )
    return ""


def has_triton() -> bool:
    """Returns whether this JAX has Pallas' Triton backend, which is deprecated since 0.11.0."""
    return (Path(jax.__file__).parent / "experimental" / "pallas" / "triton.py").exists()


def explain_missing_mosaic() -> str:
    """Returns why this JAX, or its ptxas, must not compile Mosaic bodies; "" if it can."""
    if tuple(int(part) for part in jax.__version__.split(".")[:3]) < OLDEST_JAX:
        return f"Mosaic bodies need jax 0.11.2 or later; this is {jax.__version__}"
    return find_fault()

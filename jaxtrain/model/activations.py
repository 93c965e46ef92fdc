"""GELU and norms. Their forms for GPUs are in pallas_kernels/gelu_xla.py and norm_xla.py."""

import jax

from pallas_kernels.norm_xla import normalise, normalise_gpu

__all__ = ["gelu", "normalise", "normalise_gpu"]


def gelu(x: jax.Array) -> jax.Array:
    """Computes GELU with tanh, as GPT-2 and Gemma do."""
    return jax.nn.gelu(x, approximate=True)

"""All Triton API calls live here, so that a JAX upgrade touches one file.

Kernels for sm_86 (A40, RTX A6000) use Pallas' Triton backend. JAX 0.11 deprecates it in favour of
Mosaic GPU, but Mosaic GPU supports sm_86 only in part, and on jax 0.10.2 not at all.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.validation import without_derivative

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton

load, store = triton.load, triton.store


def dot(a: jax.Array, b: jax.Array, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """Returns the product with float32 sums.

    float32 operands are multiplied in float32; Triton's default would round them to TF32.
    """
    return triton.dot(a, b, trans_a=trans_a, trans_b=trans_b, allow_tf32=False)


def call(
    kernel: Callable,
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    warps: int,
    stages: int = 1,
    interpret: bool = False,
) -> Callable:
    """Returns pl.pallas_call of a kernel whose refs are entire arrays; it has no derivative.

    Args:
        interpret: runs op by op on any device; only for tests.
    """
    program = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
    )
    return without_derivative(program, name)


def like(
    x: jax.Array, dtype: Any = None, shape: tuple[int, ...] | None = None
) -> jax.ShapeDtypeStruct:
    """Returns a ShapeDtypeStruct with the shape and type of x, unless others are given."""
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, dtype or x.dtype)


class Head:
    """Reads and writes one head of one batch row; positions past the end read as zeros."""

    def __init__(self, batch: Any, head: Any):
        self.batch, self.head = batch, head

    def read(self, ref: Any, rows: jax.Array) -> jax.Array:
        """Reads [rows,K] of an array [B,T,H,K]."""
        block = ref.at[self.batch, rows[:, None], self.head, jnp.arange(ref.shape[3])[None, :]]
        return load(block, mask=(rows < ref.shape[1])[:, None], other=0.0)

    def write(self, ref: Any, rows: jax.Array, x: jax.Array) -> None:
        block = ref.at[self.batch, rows[:, None], self.head, jnp.arange(ref.shape[3])[None, :]]
        store(block, x.astype(ref.dtype), mask=(rows < ref.shape[1])[:, None])

    def read_vector(self, ref: Any, rows: jax.Array, other: float) -> jax.Array:
        """Reads one number for each position from [B,H,T]."""
        block = ref.at[self.batch, self.head, rows]
        return load(block, mask=rows < ref.shape[2], other=other)

"""The one door to Pallas' Triton backend, which JAX 0.11 deprecates in favour of Mosaic GPU.

Mosaic serves an A40 only in part, and not at all on jax 0.10.2. A kernel that gets a Mosaic body
changes its own file; when Triton goes, this file goes with it.
"""

import warnings

import jax
from jax.experimental import pallas as pl

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton

load, store = triton.load, triton.store


def dot(a, b, trans_a=False, trans_b=False):
    """Product with float32 sums; of float32 operands in float32, where Triton's default is TF32."""
    return triton.dot(a, b, trans_a=trans_a, trans_b=trans_b, allow_tf32=False)


def call(kernel, *, name, grid, out_shape, warps, stages=1, interpret=False, aliases=None):
    """pl.pallas_call of a kernel whose refs are whole arrays.

    Args:
        interpret: runs on any device, op by op: for tests alone.
        aliases: {argument: output} that share a buffer.
    """
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        input_output_aliases=aliases or {},
        interpret=interpret,
    )


def like(x, dtype=None, shape=None):
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, dtype or x.dtype)

"""All Triton API calls live here, so that a JAX upgrade touches one file.

JAX 0.11 deprecates this backend in favour of Mosaic GPU, which jax 0.10.2 lacks for sm_86 (A40, RTX
A6000). The bodies in Mosaic GPU for these GPUs are in *_ampere.py.
"""

import functools
import struct
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kernel_call import without_derivative

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from jax.experimental.pallas import triton as backend
    except ImportError:  # the bodies in Mosaic GPU do not need it
        backend = None

triton: Any = backend
load: Any = getattr(triton, "load", None)
store: Any = getattr(triton, "store", None)


def dot(a: jax.Array, b: jax.Array, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """Returns the product with float32 sums.

    float32 operands are multiplied in float32; Triton's default would round them to TF32.
    """
    return triton.dot(a, b, trans_a=trans_a, trans_b=trans_b, allow_tf32=False)


def exp2(x: jax.Array, scale: float, shift: jax.Array, interpret: bool) -> jax.Array:
    """Returns 2**(x * scale - shift) in float32, on a GPU by two instructions for each element.

    Otherwise the compiler multiplies and subtracts separately, and exp2 of CUDA's library takes
    three more instructions to be exact below 2**-126, where this gives 0. The relative error of ex2
    is at most 2**-22.5; NaN and infinities give what jnp.exp2 does.

    Source: fma and ex2 in NVIDIA's PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution
    """
    if interpret:
        return jnp.exp2(x * scale - shift)
    (result,) = triton.elementwise_inline_asm(
        "{.reg .f32 e; fma.rn.f32 e, $1, $2, $3; ex2.approx.ftz.f32 $0, e;}",
        args=[x, jnp.full_like(x, scale), jnp.broadcast_to(-shift, x.shape)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def ptx_float(number: float) -> str:
    """Returns a number as PTX writes an exact float32 constant."""
    return f"0f{struct.unpack('>I', struct.pack('>f', number))[0]:08X}"


def inline_assembly(assembly: str, *arrays: jax.Array) -> jax.Array:
    """Returns what a fragment of PTX computes from each element of float32 arrays, in float32.

    The compiler would not merge a product and a sum that it was given, as `fma` in PTX does.

    Args:
        assembly: reads an element of each array as $1, $2, ..., and writes $0.
    """
    (result,) = triton.elementwise_inline_asm(
        assembly,
        args=arrays,
        constraints=",".join(["=f"] + ["f"] * len(arrays)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)],
    )
    return result


def fma(a: jax.Array, b: jax.Array, c: jax.Array, interpret: bool) -> jax.Array:
    """Returns a * b + c of float32 arrays, which are broadcast, on a GPU by one instruction."""
    if interpret:
        return a * b + c
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    return inline_assembly(
        "fma.rn.f32 $0, $1, $2, $3;", *(jnp.broadcast_to(x, shape) for x in (a, b, c))
    )


def narrow(x: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    """Returns x, in float32, rounded to dtype.

    A value that is rounded, stored and also read again is otherwise rounded by an instruction that
    is as slow as exp2; this one rounds two numbers at once.
    """
    if interpret or dtype != jnp.bfloat16 or x.size % 2:
        return x.astype(dtype)
    (result,) = triton.elementwise_inline_asm(
        "cvt.rn.bf16x2.f32 $0, $2, $1;",
        args=[x],
        constraints="=r,f,f",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)],
    )
    return result


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

    Raises:
        ValueError: JAX has removed its Triton backend.
    """
    if triton is None:
        raise ValueError(
            f"jax {jax.__version__} has no Triton backend for the kernel {name}. Give it tiles of "
            "a Mosaic body, or install jax 0.11."
        )
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


def load_inside(ref: Any, mask: Any) -> jax.Array:
    """Loads a block, with zeros where the mask is false; None loads all of it."""
    return load(ref) if mask is None else load(ref, mask=mask, other=0.0)


def join_masks(shape: tuple[int, ...], *masks: Any) -> Any:
    """Returns where all masks that are not None are true, of a shape; None if all are None."""
    wide = [jnp.broadcast_to(mask, shape) for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, wide) if wide else None


def loop_over_blocks(
    program: Any, programs: int, blocks: int, body: Callable[[Any, Any], Any], carry: Any
) -> Any:
    """Runs body(step, carry) for each block of a program: block number program + step * programs.

    Args:
        programs: at most `blocks`.
    """
    if programs == blocks:
        return body(0, carry)
    return jax.lax.fori_loop(0, -((program - blocks) // programs), body, carry)


class Head:
    """Reads and writes one head of one batch row; positions past the end read as zeros."""

    def __init__(self, batch: Any, head: Any):
        self.batch, self.head = batch, head

    def read(self, ref: Any, rows: jax.Array, inside: bool = False) -> jax.Array:
        """Reads [rows,K] of an array [B,T,H,K].

        Args:
            inside: no position is past the end, so that none needs to be compared with it.
        """
        block = ref.at[self.batch, rows[:, None], self.head, jnp.arange(ref.shape[3])[None, :]]
        if inside:
            return load(block)
        return load(block, mask=(rows < ref.shape[1])[:, None], other=0.0)

    def write(self, ref: Any, rows: jax.Array, x: jax.Array) -> None:
        block = ref.at[self.batch, rows[:, None], self.head, jnp.arange(ref.shape[3])[None, :]]
        store(block, x.astype(ref.dtype), mask=(rows < ref.shape[1])[:, None])

    def read_vector(
        self, ref: Any, rows: jax.Array, other: float, inside: bool = False
    ) -> jax.Array:
        """Reads one number for each position from [B,H,T]; past the end it is `other`."""
        block = ref.at[self.batch, self.head, rows]
        if inside:
            return load(block)
        return load(block, mask=rows < ref.shape[2], other=other)

    def read_pairs(
        self, ref: Any, rows: jax.Array, columns: jax.Array, inside: bool = False
    ) -> jax.Array:
        """Reads [rows,columns] of one matrix of an array [B,H,S,T]; `inside` is as in read."""
        block, mask = self._pairs(ref, rows, columns)
        return load(block) if inside else load(block, mask=mask, other=0.0)

    def write_pairs(self, ref: Any, rows: jax.Array, columns: jax.Array, x: jax.Array) -> None:
        """Writes what read_pairs reads."""
        block, mask = self._pairs(ref, rows, columns)
        store(block, x, mask=mask)

    def _pairs(self, ref, rows, columns):
        block = ref.at[self.batch, self.head, rows[:, None], columns[None, :]]
        return block, (rows < ref.shape[2])[:, None] & (columns < ref.shape[3])[None, :]

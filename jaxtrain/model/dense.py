"""The matrix product of every linear layer: [B,T,I] x [I,O] + [O] -> [B,T,O].

On GPU the plain product is fast. On CPU autodiff of `x @ w` is 2.4-2.75 times slower than dense_cpu
(4 layers, width 256, jax 0.10.2): XLA fuses the elementwise backward into a transposed copy for dW.
It uses its bf16 kernel (AVX512-BF16) only for dots with a float32 result, and for dW only if batch
and time are contracted as two dims. On jax 0.11.2 the plain bf16 dW is a naive loop, another 5.5
times slower.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def wide_dtype(dtype: DTypeLike) -> DTypeLike:
    """Returns the type in which values of `dtype` are summed: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def dense_plain(x_BTI: jax.Array, w_IO: jax.Array, b_O: jax.Array | None = None) -> jax.Array:
    """Computes x w + b in x.dtype, with JAX's own backward. b_O is at least float32."""
    y_BTO = jnp.einsum("BTI,IO->BTO", x_BTI, w_IO)
    if b_O is None:
        return y_BTO
    return (y_BTO.astype(b_O.dtype) + b_O).astype(y_BTO.dtype)  # sums b's gradient in float32


def _contract(a, b, dims_a, dims_b, upcast):
    """Contracts the given dims of a and b, in at least float32."""
    wide = wide_dtype(a.dtype)
    if upcast:
        a, b = a.astype(wide), b.astype(wide)
    return jax.lax.dot_general(a, b, ((dims_a, dims_b), ((), ())), preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense_cpu(
    x_BTI: jax.Array, w_IO: jax.Array, b_O: jax.Array | None = None, upcast: bool = False
) -> jax.Array:
    """Computes dense_plain with dots that select XLA's fast CPU kernels, rounding once.

    Args:
        upcast: casts the operands to float32, for CPUs without bf16 products. XLA's bf16 dot is
            slower there (42-50 against 63-77 GFLOP/s a core, AVX2, jax 0.10.2 and 0.11.2).
    """
    y_BTO = _contract(x_BTI, w_IO, (2,), (0,), upcast)
    return (y_BTO if b_O is None else y_BTO + b_O).astype(x_BTI.dtype)


def _forward(x_BTI, w_IO, b_O, upcast):
    return dense_cpu(x_BTI, w_IO, b_O, upcast), (x_BTI, w_IO, b_O is not None)


def _backward(upcast, residuals, g_BTO):
    x_BTI, w_IO, has_bias = residuals
    dx_BTI = _contract(g_BTO, w_IO, (2,), (1,), upcast).astype(x_BTI.dtype)
    dw_IO = _contract(x_BTI, g_BTO, (0, 1), (0, 1), upcast).astype(w_IO.dtype)
    db_O = g_BTO.astype(wide_dtype(g_BTO.dtype)).sum((0, 1)) if has_bias else None
    return dx_BTI, dw_IO, db_O


dense_cpu.defvjp(_forward, _backward)

DENSE = {
    "plain": dense_plain,
    "cpu": dense_cpu,
    "cpu_wide": functools.partial(dense_cpu, upcast=True),
}

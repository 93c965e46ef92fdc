"""The one matrix product of the model: [B,T,I] x [I,O] + [O] -> [B,T,O].

On CPU, autodiff of `x @ w` is 2.4-2.75 times slower than what stands here (4 layers, width 256, jax
0.10.2): XLA fuses the elementwise backward into a transposed copy for dW, and its bf16 kernel
(AVX512-BF16) is only taken by dots with a float32 result and, in dW, by dots that contract batch
and time unflattened. On jax 0.11.2 the plain bf16 dW is a naive loop, 5.5 times slower again. On
GPU the plain product is already right, and is what runs.
"""

import functools

import jax
import jax.numpy as jnp


def dense_plain(x_BTI, w_IO, b_O=None):
    """[B,T,I], [I,O] -> [B,T,O] in x.dtype; XLA's own backward. b_O: in at least float32."""
    y_BTO = jnp.einsum("BTI,IO->BTO", x_BTI, w_IO)
    if b_O is None:
        return y_BTO
    return (y_BTO.astype(b_O.dtype) + b_O).astype(y_BTO.dtype)  # a bf16 sum would lose its gradient


def _contract(a, b, dims_a, dims_b, upcast):
    """Sum over the named dims, in at least float32."""
    wide = _wide(a)
    if upcast:
        a, b = a.astype(wide), b.astype(wide)
    return jax.lax.dot_general(a, b, ((dims_a, dims_b), ((), ())), preferred_element_type=wide)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense_cpu(x_BTI, w_IO, b_O=None, upcast=False):
    """dense_plain, with the products that XLA's CPU kernels are fast at; rounded once.

    upcast widens the operands: for processors without bf16 products, where XLA's own route is
    slower than float32 (42-50 against 63-77 GFLOP/s a core, AVX2, jax 0.10.2 and 0.11.2).
    """
    y_BTO = _contract(x_BTI, w_IO, (2,), (0,), upcast)
    return (y_BTO if b_O is None else y_BTO + b_O).astype(x_BTI.dtype)


def _forward(x_BTI, w_IO, b_O, upcast):
    return dense_cpu(x_BTI, w_IO, b_O, upcast), (x_BTI, w_IO, b_O is not None)


def _backward(upcast, residuals, g_BTO):
    x_BTI, w_IO, biased = residuals
    dx_BTI = _contract(g_BTO, w_IO, (2,), (1,), upcast).astype(x_BTI.dtype)
    dw_IO = _contract(x_BTI, g_BTO, (0, 1), (0, 1), upcast).astype(w_IO.dtype)
    db_O = g_BTO.astype(_wide(g_BTO)).sum((0, 1)) if biased else None
    return dx_BTI, dw_IO, db_O


dense_cpu.defvjp(_forward, _backward)

DENSE = {
    "plain": dense_plain,
    "cpu": dense_cpu,
    "cpu_wide": functools.partial(dense_cpu, upcast=True),
}

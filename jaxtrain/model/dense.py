"""The one matrix product of the model: [B,T,I] x [I,O] -> [B,T,O].

On CPU, autodiff of `x @ w` is 2.4-2.75 times slower than what stands here (4 layers, width 256, jax
0.10.2): XLA fuses the elementwise backward into a transposed copy for dW, and its bf16 kernel
(AVX512-BF16) is only taken by dots with a float32 result and, in dW, by dots that contract batch
and time unflattened. On jax 0.11.2 the plain bf16 dW is a naive loop, 5.5 times slower again. On
GPU the plain product is already right, and is what runs.
"""

import functools

import jax
import jax.numpy as jnp


def dense_plain(x_BTI, w_IO):
    """[B,T,I], [I,O] -> [B,T,O] in x.dtype; XLA's own backward."""
    return jnp.einsum("BTI,IO->BTO", x_BTI, w_IO)


def _contract(a, b, dims_a, dims_b, dtype, upcast):
    """Sum over the named dims, in at least float32, returned in dtype."""
    wide = jnp.promote_types(dtype, jnp.float32)
    if upcast:
        a, b = a.astype(wide), b.astype(wide)
    out = jax.lax.dot_general(a, b, ((dims_a, dims_b), ((), ())), preferred_element_type=wide)
    return out.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense_cpu(x_BTI, w_IO, upcast=False):
    """dense_plain, with the products that XLA's CPU kernels are fast at.

    upcast widens the operands: for processors without bf16 products, where XLA's own route is
    slower than float32 (42-50 against 63-77 GFLOP/s a core, AVX2, jax 0.10.2 and 0.11.2).
    """
    return _contract(x_BTI, w_IO, (2,), (0,), x_BTI.dtype, upcast)


def _forward(x_BTI, w_IO, upcast):
    return dense_cpu(x_BTI, w_IO, upcast), (x_BTI, w_IO)


def _backward(upcast, residuals, g_BTO):
    x_BTI, w_IO = residuals
    dx_BTI = _contract(g_BTO, w_IO, (2,), (1,), x_BTI.dtype, upcast)
    dw_IO = _contract(x_BTI, g_BTO, (0, 1), (0, 1), w_IO.dtype, upcast)
    return dx_BTI, dw_IO


dense_cpu.defvjp(_forward, _backward)

DENSE = {
    "plain": dense_plain,
    "cpu": dense_cpu,
    "cpu_wide": functools.partial(dense_cpu, upcast=True),
}

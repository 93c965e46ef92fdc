"""Norms and GELU with backward passes for GPUs, where bytes and not operations limit both.

Of autodiff's backward XLA writes a layer norm's standardised input times its gradient to memory in
float32, only to sum its columns, and on an H100 it stores GELU's tanh beside GELU's input. Here a
norm stores two numbers for each row, and GELU nothing but the product that it is computed from.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxtrain.model.dense import wide_dtype


def _standardise(x_XD, form, dims, eps):
    """Returns (x - mean) * rstd in at least float32, mean or None, and rstd."""
    x, mean = x_XD.astype(wide_dtype(x_XD.dtype)), None
    if form == "layer":
        mean = x.mean(dims, keepdims=True)
        x = x - mean
    rstd = jax.lax.rsqrt((x * x).mean(dims, keepdims=True) + eps)
    return x * rstd, mean, rstd


def _scale(x, gain, bias, dtype):
    if gain is not None:
        x = x * gain
    if bias is not None:
        x = x + bias
    return x.astype(dtype)


def normalise(
    x_XD: jax.Array,
    gain_D: jax.Array | None,
    bias_D: jax.Array | None,
    form: str,
    dims: tuple[int, ...],
    eps: float,
) -> jax.Array:
    """Computes an RMS or layer norm over `dims` in at least float32; returns x.dtype.

    Args:
        form: "rms" or "layer".
        dims: the last dims of x, which gain and bias have too.
    """
    return _scale(_standardise(x_XD, form, dims, eps)[0], gain_D, bias_D, x_XD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalise_gpu(
    x_XD: jax.Array,
    gain_D: jax.Array | None,
    bias_D: jax.Array | None,
    form: str,
    dims: tuple[int, ...],
    eps: float,
) -> jax.Array:
    """Computes `normalise`; its backward reads x and the gradient, and stores no product of them.

    Let s be the standardised x and g the gradient times gain. The gradient of x is
    rstd * (g - mean(g) - s * mean(g * s)) with means over `dims`; an RMS norm has no mean(g).
    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450, differentiated.
    """
    return normalise(x_XD, gain_D, bias_D, form, dims, eps)


def _normalise_forward(x_XD, gain_D, bias_D, form, dims, eps):
    s, *statistics = _standardise(x_XD, form, dims, eps)
    return _scale(s, gain_D, bias_D, x_XD.dtype), (x_XD, gain_D, bias_D is not None, statistics)


def _normalise_backward(form, dims, eps, residuals, dy_XD):
    x_XD, gain_D, has_bias, statistics = residuals
    # Without the barrier XLA would compute the statistics again in each fusion that needs them, in
    # a form in which the sums over columns cannot share a pass over memory with the rest.
    mean, rstd = jax.lax.optimization_barrier(statistics)
    x, dy = x_XD.astype(rstd.dtype), dy_XD.astype(rstd.dtype)
    s = (x if mean is None else x - mean) * rstd
    g = dy if gain_D is None else dy * gain_D
    dx = g - s * (g * s).mean(dims, keepdims=True)
    if form == "layer":
        dx = dx - g.mean(dims, keepdims=True)
    rows = tuple(range(dy.ndim - len(dims)))
    dgain_D = None if gain_D is None else (dy * s).sum(rows)
    return (dx * rstd).astype(x_XD.dtype), dgain_D, dy.sum(rows) if has_bias else None


normalise_gpu.defvjp(_normalise_forward, _normalise_backward)


def gelu(x: jax.Array) -> jax.Array:
    """Computes GELU with tanh, as GPT-2 and Gemma do."""
    return jax.nn.gelu(x, approximate=True)


RATE, CUBIC = math.sqrt(8 / math.pi), 0.044715  # GELU is u * sigmoid(RATE * (u + CUBIC * u^3))


@jax.custom_vjp
def gelu_gpu(x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Computes `gelu(x + bias)` in at least float32; returns x.dtype, rounded once.

    A GPU's instructions limit it as much as its memory, so a sigmoid takes the place of the tanh:
    26 instructions a number instead of 37 (H200, jax 0.11.2). The backward needs x, which the
    product before it writes anyway, and not x + bias.

    Args:
        bias: of the last dim, in at least float32.
    """
    u = _add_bias(x, bias)
    return (u * _sigmoid(u, u * u)).astype(x.dtype)


def _add_bias(x, bias):
    x = x.astype(wide_dtype(x.dtype))
    return x if bias is None else x + bias


def _sigmoid(u, u2):
    """Returns sigmoid(RATE * (u + CUBIC * u^3)), given u^2 too."""
    # A reciprocal root is one instruction on a GPU, a division about six.
    root = jax.lax.rsqrt(1 + jnp.exp(u * (-RATE * CUBIC * u2 - RATE)))
    return root * root


def _gelu_forward(x, bias):
    return gelu_gpu(x, bias), (x, bias)


def _gelu_backward(residuals, dy):
    x, bias = residuals
    # Without the barrier XLA would store the forward's sigmoid instead of computing it again.
    x = jax.lax.optimization_barrier(x)
    u, dy = _add_bias(x, bias), dy.astype(wide_dtype(dy.dtype))
    u2 = u * u
    sigmoid, slope = _sigmoid(u, u2), 3 * RATE * CUBIC * u2 + RATE
    dx = (dy * sigmoid * (1 + (u - u * sigmoid) * slope)).astype(x.dtype)
    return dx, None if bias is None else dx.astype(bias.dtype).sum(tuple(range(dx.ndim - 1)))


gelu_gpu.defvjp(_gelu_forward, _gelu_backward)

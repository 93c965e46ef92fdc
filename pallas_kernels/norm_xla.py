"""RMS and layer norms in plain JAX, one with a backward pass for GPUs, where bytes limit it.

Of autodiff's backward XLA writes a layer norm's standardised input times its gradient to memory in
float32, only to sum its columns. Here a norm stores two numbers for each row. The kernel of the
same results is in add_norm.py.
"""

import functools

import jax
import jax.numpy as jnp


def _standardise(x_XD, form, dims, eps):
    """Returns (x - mean) * rstd in at least float32, mean or None, and rstd."""
    x, mean = x_XD.astype(jnp.promote_types(x_XD.dtype, jnp.float32)), None
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

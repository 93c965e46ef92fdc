"""Norms and GELU with backward passes for GPUs, where bytes and not operations limit both.

Autodiff leaves it to XLA what the backward stores and what it recomputes. At D=768 XLA writes each
norm's normalised input times its gradient to memory in float32, only to sum its columns, and keeps
GELU's tanh beside GELU's input. The functions here store what is small and recompute the rest.
`optimization_barrier` marks the border: XLA neither fuses nor merges across it.
"""

import functools

import jax

from jaxtrain.model.dense import wide_dtype


def _statistics(x_XD, form, dims, eps):
    """Returns (mean or None, 1 / root mean square of the rest) of x, in at least float32."""
    x = x_XD.astype(wide_dtype(x_XD.dtype))
    mean = None
    if form == "layer":
        mean = x.mean(dims, keepdims=True)
        x = x - mean
    return mean, jax.lax.rsqrt((x * x).mean(dims, keepdims=True) + eps)


def _standardise(x_XD, mean, rstd):
    x = x_XD.astype(wide_dtype(x_XD.dtype))
    return (x if mean is None else x - mean) * rstd


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
    statistics = _statistics(x_XD, form, dims, eps)
    return _scale(_standardise(x_XD, *statistics), gain_D, bias_D, x_XD.dtype)


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

    With s the standardised x and a bar for the mean over `dims`, the gradient of x is
    rstd * (g - mean(g) - s * mean(g * s)), g being the gradient times gain. An RMS norm has no
    mean(g). Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450, differentiated.
    """
    return normalise(x_XD, gain_D, bias_D, form, dims, eps)


def _normalise_forward(x_XD, gain_D, bias_D, form, dims, eps):
    statistics = _statistics(x_XD, form, dims, eps)
    y_XD = _scale(_standardise(x_XD, *statistics), gain_D, bias_D, x_XD.dtype)
    return y_XD, (x_XD, gain_D, bias_D is not None, statistics)


def _normalise_backward(form, dims, eps, residuals, dy_XD):
    x_XD, gain_D, has_bias, statistics = residuals
    # Without the barrier XLA would compute the statistics again in each fusion that needs them, in
    # a form in which the sums over columns cannot share a pass over memory with the rest.
    mean, rstd = jax.lax.optimization_barrier(statistics)
    s, dy = _standardise(x_XD, mean, rstd), dy_XD.astype(rstd.dtype)
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


def _gelu_wide(x):
    return gelu(x.astype(wide_dtype(x.dtype))).astype(x.dtype)


@jax.custom_vjp
def gelu_gpu(x: jax.Array) -> jax.Array:
    """Computes `gelu` in at least float32, rounding once; its backward recomputes the tanh.

    Bfloat16 arithmetic rounds each of its ten operations and both constants.
    """
    return _gelu_wide(x)


def _gelu_backward(x, dy):
    return jax.vjp(_gelu_wide, jax.lax.optimization_barrier(x))[1](dy)


gelu_gpu.defvjp(lambda x: (_gelu_wide(x), x), _gelu_backward)

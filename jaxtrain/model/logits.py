"""Soft-caps of logits: odd functions of slope 1 at 0 that stay between -c and c."""

import jax
import jax.numpy as jnp


def cap_logits(x: jax.Array, c: float, form: str = "tanh") -> jax.Array:
    """Returns c * tanh(x / c), or c * x / sqrt(x^2 + c^2) with form="sqrt"; x itself if c is 0."""
    if not c:
        return x
    if form == "tanh":  # as in Gemma 2, https://arxiv.org/abs/2408.00118
        return c * jnp.tanh(x / c)
    # Source: https://github.com/KellerJordan/modded-nanogpt, track 3
    return c * x * jax.lax.rsqrt(x**2 + c**2)


def cap_slope(y: jax.Array, c: float, form: str = "tanh") -> jax.Array:
    """Returns the derivative of cap_logits by x, from its value y; c must not be 0.

    It is 1 - tanh^2 for tanh. For x / sqrt(x^2 + 1) it is (x^2 + 1)^(-3/2), and 1 - y^2 is
    1 / (x^2 + 1).
    """
    rest = 1 - (y / c) ** 2
    return rest if form == "tanh" else rest**1.5

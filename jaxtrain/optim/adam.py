"""Adam's direction, with a state that a step with a non-finite gradient leaves unchanged.

Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamState(NamedTuple):
    count: jax.Array  # int32 [], good steps
    mean: optax.Updates  # averaged gradient, like params
    square: optax.Updates  # averaged square of the gradient, like params


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam; `update(..., good=False)` leaves the state unchanged."""

    def init(params):
        zeros = optax.tree.zeros_like
        return AdamState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(updates, state, params=None, *, good: jax.Array | bool = True, **extra):
        del params, extra
        # `good` is applied inside each average: XLA then writes it into the old one's buffer.
        # Selected after the update, both are live (14.7 GB of temporaries against 11.7 at 1.4B
        # parameters with Muon, CPU, jax 0.10.2).
        average = lambda decay: lambda m, x: jnp.where(good, decay * m + (1 - decay) * x, m)
        mean = jax.tree.map(average(b1), state.mean, updates)
        square = jax.tree.map(average(b2), state.square, jax.tree.map(jnp.square, updates))
        count = state.count + jnp.where(good, 1, 0)
        # Averages start at zero: dividing by 1 - decay^count removes that bias.
        correction = lambda decay: 1 - decay ** jnp.maximum(count, 1).astype(float)
        correction1, correction2 = correction(b1), correction(b2)
        direction = lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + eps)
        return jax.tree.map(direction, mean, square), AdamState(count, mean, square)

    return optax.GradientTransformationExtraArgs(init, update)

"""Adam's direction, with a state that a bad step leaves as it was.

Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamState(NamedTuple):
    count: jax.Array  # int32 [], good steps
    mean: optax.Updates  # of the gradient, like params
    square: optax.Updates  # mean of its square, like params


def scale_by_adam(b1, b2, eps) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam; `update(..., good=False)` keeps the state.

    The choice is made inside each average, so that the average is made in the old one's buffer:
    chosen afterwards, XLA holds both (14.7 GB of temporaries against 11.7 at 1.4B parameters with
    Muon, CPU, jax 0.10.2).
    """

    def init(params):
        zeros = optax.tree.zeros_like
        return AdamState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(grads, state, params=None, *, good=True, **extra):
        del params, extra
        average = lambda decay: lambda m, x: jnp.where(good, decay * m + (1 - decay) * x, m)
        mean = jax.tree.map(average(b1), state.mean, grads)
        square = jax.tree.map(average(b2), state.square, jax.tree.map(jnp.square, grads))
        count = state.count + jnp.where(good, 1, 0)
        share = lambda decay: 1 - decay ** jnp.maximum(count, 1).astype(float)
        share1, share2 = share(b1), share(b2)
        direction = lambda m, v: (m / share1) / (jnp.sqrt(v / share2) + eps)
        return jax.tree.map(direction, mean, square), AdamState(count, mean, square)

    return optax.GradientTransformationExtraArgs(init, update)

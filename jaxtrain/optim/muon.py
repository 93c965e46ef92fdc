"""Muon: momentum, then each matrix replaced by its nearest semi-orthogonal one.

The semantics are torch.optim.Muon's: momentum is an average (not a sum), Nesterov mixes the
gradient back in, and the size of the step follows from the matrix's shape.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optim import pick
from jaxtrain.optim.orthogonalize import CHUNK_BYTES, orthogonalize, whole

# (inputs, outputs) -> factor of a matrix whose singular values are 1.
# Source of match_rms_adamw: Liu et al. 2025, https://arxiv.org/abs/2502.16982
SCALES = {
    "original": lambda inputs, outputs: math.sqrt(max(1.0, outputs / inputs)),
    "match_rms_adamw": lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),
}


class MuonState(NamedTuple):
    momentum: optax.Updates  # like params


def scale_by_muon(
    axes,
    momentum=0.95,
    nesterov=True,
    steps=5,
    scale="original",
    dtype=jnp.bfloat16,
    place=whole,
    rest=lambda axes, x: x,
    via=lambda axes, x: x,
    chunk_bytes=CHUNK_BYTES,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, orthogonalised matrix by matrix, times the factor of its shape.

    Args:
        axes: pytree of Axes, like params; every leaf a matrix.
        momentum: decay of the averaged gradient, in [0, 1).
        scale: a key of SCALES.
        steps, dtype, place, chunk_bytes: see `orthogonalize`. float64 leaves iterate in float64.
        rest: (Axes, array) -> array, constrained as the parameter rests. Without it the partitioner
            reshards both terms of both averages: 4 all-to-alls a leaf instead of 2.
        via: likewise, constrained as between `rest` and `place`, for layouts that XLA cannot change
            in one step without making the array whole.

    Raises:
        ValueError: momentum is outside [0, 1), or scale is not in the table.
    """
    if not 0 <= momentum < 1:
        raise ValueError(
            f"optim.momentum must be in [0, 1); got {momentum}. Set --config.optim.momentum."
        )
    factor = pick(SCALES, scale, "optim.muon_scale")

    def average(m, g):
        return momentum * m + (1 - momentum) * g

    def kept(good):  # inside the average, so that it is made in m's own buffer
        return lambda m, g: jnp.where(good, average(m, g), m)

    def direction(a, x):
        narrow = jnp.float64 if x.dtype == jnp.float64 else dtype
        function = functools.partial(
            orthogonalize, steps=steps, dtype=narrow, place=place, chunk_bytes=chunk_bytes
        )
        x_narrow = via(a, rest(a, x.astype(narrow)))  # travels narrow both ways
        y = rest(a, via(a, a.on_matrices(function, x_narrow)))
        _, inputs, outputs = a.matrix_shape(x.shape)
        return factor(inputs, outputs) * y.astype(x.dtype)

    def init(params):
        return MuonState(optax.tree.zeros_like(params))

    def update(grads, state, params=None, *, good=True, **extra):
        del params, extra
        mean = jax.tree.map(kept(good), state.momentum, grads)
        ahead = jax.tree.map(average, mean, grads) if nesterov else mean
        updates = jax.tree.map(direction, axes, ahead)
        return updates, MuonState(mean)

    return optax.GradientTransformationExtraArgs(init, update)

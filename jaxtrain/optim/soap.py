"""SOAP: Adam in the eigenbases of Shampoo's factors.

Momentum and gradient are rotated by the bases of preconditioner.py. The average of the rotated
gradient's squares divides the rotated momentum, as in Adam, and the result is rotated back.

Source: Vyas et al. 2024, https://arxiv.org/abs/2409.11321, and its code, nikhilvyas/SOAP, soap.py
"""

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import AxesTree
from jaxtrain.ops.routes import Route
from jaxtrain.optim.adam import bias_correction
from jaxtrain.optim.preconditioner import (
    as_matrices,
    check_range,
    precondition,
    preconditioner_options,
    rotate,
    rotate_back,
)


def scale_by_soap(
    axes: AxesTree,
    momentum: float = 0.95,
    decay: float = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    **options,
) -> optax.GradientTransformationExtraArgs:
    """Builds SOAP's direction: Adam's, computed in the eigenbases of Shampoo's factors.

    The first step returns zeros and only computes the factors and bases, as in the source; counts
    of the bias corrections start after it. The momentum is stored without rotation and rotated by
    the current bases in each step. The source rotates its stored momentum whenever the bases
    change, which is the same in exact arithmetic.

    Args:
        axes: pytree of Axes, like params, all matrices.
        momentum: decay of the averaged gradient, in [0, 1).
        decay: decay of the averaged square and of the factors, in [0, 1).
        eps: added to the root of the averaged square before the bias correction, as in the source.
        every: steps from one refresh of the bases to the next.
        options: further arguments of `precondition`.

    Raises:
        ValueError: an argument is out of range.
    """
    check_range("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")

    def direction(a, g, state, progress):
        started = progress.has_bases
        mean = progress.average(momentum, state.momentum, g, started)
        rotated_XIO = rotate(as_matrices(a, g, state), state)
        square_XIO = progress.average(decay, state.square, rotated_XIO**2, started)
        steps = jnp.maximum(progress.count, 1).astype(float)
        correction = jnp.sqrt(bias_correction(decay, steps)) / bias_correction(momentum, steps)
        mean_XIO = rotate(as_matrices(a, mean, state), state)
        scaled_XIO = correction.astype(mean_XIO.dtype) * mean_XIO / (jnp.sqrt(square_XIO) + eps)
        u = a.from_matrices(rotate_back(scaled_XIO, state), g.shape)
        return u, state._replace(momentum=mean, square=square_XIO)

    return precondition(axes, direction, decay, every, **options)


def build_soap(
    cfg: OptimConfig, axes: AxesTree, mesh: Mesh | None, square: Route | None
) -> optax.GradientTransformationExtraArgs:
    """Builds a config's SOAP direction of matrices, before the rate; square is not used.

    Args:
        axes: pytree of Axes, like params, all matrices.
        mesh: mesh over which params are split; None means one device.
    """
    del square
    return scale_by_soap(
        axes, cfg.momentum, eps=cfg.adam_eps, **preconditioner_options(cfg), mesh=mesh
    )

"""SOAP: Adam in the eigenbases of Shampoo's factors.

Momentum and gradient are rotated by the bases of preconditioner.py. The average of the rotated
gradient's squares divides the rotated momentum, as in Adam, and the result is rotated back.

Source: Vyas et al. 2024, https://arxiv.org/abs/2409.11321, and its code, nikhilvyas/SOAP, soap.py
"""

from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import AxesTree
from jaxtrain.ops.routes import Route
from jaxtrain.optim import Hyperparameter, check_decay, check_number
from jaxtrain.optim.adam import bias_correction
from jaxtrain.optim.complete import AdamW, Rate, complete_optimizer
from jaxtrain.optim.default_axes import build_for_matrices
from jaxtrain.optim.preconditioner import (
    MAX_SIDE,
    precondition,
    preconditioner_options,
    rotate,
    rotate_back,
)


def scale_by_soap(
    axes: Any = None,
    momentum: Hyperparameter = 0.95,
    decay: Hyperparameter = 0.95,
    eps: Hyperparameter = 1e-8,
    every: Hyperparameter = 10,
    **options,
) -> optax.GradientTransformationExtraArgs:
    """Builds SOAP's direction: Adam's, computed in the eigenbases of Shampoo's factors.

    The first step returns zeros and only computes the factors and bases, as in the source; the
    bias corrections count from the second. The momentum is stored without rotation and rotated by
    the current bases in each step. The source rotates its stored momentum whenever the bases
    change, which is the same in exact arithmetic. Every parameter must be a matrix: `soap` is the
    optimizer of a whole model.

    Args:
        axes: see `resolve_axes`.
        momentum: decay of the averaged gradient, in [0, 1).
        decay: decay of the averaged square and of the factors, in [0, 1).
        eps: added to the root of the averaged square before the bias correction, as in the source.
        every: steps from one refresh of the bases to the next.
        options: max_side, buffer_dtype, mesh and chunk_bytes of `precondition`.

    Raises:
        ValueError: an argument is out of range, or (at init) a parameter is no matrix.
    """
    check_decay(momentum, "momentum", "optim.momentum")
    check_number(eps, "eps", "optim.adam_eps")

    def direction(g_XIO, state, progress):
        started = progress.has_bases
        mean_XIO = progress.average(momentum, state.momentum, g_XIO, started)
        rotated_XIO = rotate(g_XIO, state)
        square_XIO = progress.average(decay, state.square, rotated_XIO**2, started)
        steps = jnp.maximum(progress.count, 1).astype(float)
        correction = jnp.sqrt(bias_correction(decay, steps)) / bias_correction(momentum, steps)
        ahead_XIO = correction.astype(g_XIO.dtype) * rotate(mean_XIO.astype(g_XIO.dtype), state)
        u_XIO = rotate_back(ahead_XIO / (jnp.sqrt(square_XIO) + eps), state)
        return u_XIO, state._replace(momentum=mean_XIO, square=square_XIO)

    build = lambda axes: precondition(axes, direction, decay, every, **options)
    return build_for_matrices("soap", build, axes)


def soap(
    axes: Any = None,
    learning_rate: Rate = 3e-3,
    weight_decay: Hyperparameter = 0.01,
    *,
    momentum: Hyperparameter = 0.95,
    decay: Hyperparameter = 0.95,
    eps: Hyperparameter = 1e-8,
    every: Hyperparameter = 10,
    max_side: int = MAX_SIDE,
    buffer_dtype: DTypeLike | None = None,
    cautious_decay: bool = False,
    adam_learning_rate: Rate = 3e-3,
    adam_b1: Hyperparameter = 0.9,
    adam_b2: Hyperparameter = 0.95,
    adam_eps: Hyperparameter = 1e-8,
    adam_weight_decay: Hyperparameter | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds SOAP for the matrices and AdamW for everything else, as in the trainer.

    The defaults for matrices are the source's, and AdamW's are the trainer's. Weight decay acts
    from the first step, in which the source changes nothing.

    Args:
        axes: see `resolve_axes`; by default a rule decides by name and rank.
        momentum, decay, eps, every: see `scale_by_soap`.
        max_side, buffer_dtype: see `precondition`.
        cautious_decay: see `complete_optimizer`.
        adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay: see `AdamW`.
    """
    options = {"max_side": max_side, "buffer_dtype": buffer_dtype}
    return complete_optimizer(
        "soap",
        lambda axes: scale_by_soap(axes, momentum, decay, eps, every, **options),
        learning_rate,
        weight_decay,
        AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay),
        axes,
        cautious_decay,
    )


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

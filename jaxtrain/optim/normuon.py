"""NorMuon: Muon in which all neurons of a matrix take steps of about equal length.

Source: Li et al. 2025, https://arxiv.org/abs/2510.05491
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxtrain.model.trees import AxesTree
from jaxtrain.optim import Hyperparameter, check_decay
from jaxtrain.optim.collectives import build_mean_squares
from jaxtrain.optim.complete import AdamW, Rate, View, complete_optimizer
from jaxtrain.optim.muon import scale_by_muon
from jaxtrain.optim.newton_schulz import NewtonSchulz
from jaxtrain.optim.precision import average, widest

EPS = 1e-10  # added to the root, as in the source


class NeuronState(NamedTuple):
    square: optax.Updates  # [X,1,O] of each [X,I,O]: mean over inputs of squared directions


def balance_neurons(
    axes: AxesTree, decay: Hyperparameter = 0.95, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """Divides each output's column of Muon's direction by the root of its averaged mean square.

    Each matrix keeps its Frobenius norm, so that Muon's learning rate stays suitable.
    `update(..., good=False)` leaves the state unchanged.

    Args:
        axes: pytree of Axes, like params; every leaf a matrix.
        decay: decay of the average, in [0, 1).
        mesh: mesh over which params are split; None means one device.

    Raises:
        ValueError: decay is outside [0, 1).
    """
    check_decay(decay, "neuron_decay", "optim.neuron_decay")
    mean_squares = build_mean_squares(mesh)

    def whole(x_X1O):  # XLA would otherwise split it like the updates, and communicate for each
        if mesh is None:
            return x_X1O
        return jax.lax.with_sharding_constraint(x_X1O, NamedSharding(mesh, P()))

    def zeros(a, p):
        X, _, O = a.matrix_shape(p.shape)  # noqa: E741
        return jnp.zeros((X, 1, O), widest(p))

    def init(params):
        return NeuronState(jax.tree.map(zeros, axes, params))

    def update(updates, state, params=None, *, good: jax.Array | bool = True, **extra):
        del params, extra

        wide = lambda u, v_X1O: u.astype(widest(u, v_X1O))
        updates = jax.tree.map(wide, updates, state.square)
        means = mean_squares(axes, updates)

        def averaged(v_X1O, mean_X1O):
            new_X1O = average(decay, v_X1O, mean_X1O, mean_X1O.dtype).astype(v_X1O.dtype)
            return whole(jnp.where(good, new_X1O, v_X1O))

        def balanced(a, v_X1O, mean_X1O, u):
            # Both norms follow from the mean squares, up to a factor of the inputs' root.
            norm = lambda square_X1O: jnp.sqrt(jnp.sum(square_X1O, -1, keepdims=True))
            factor_X1O = 1 / (jnp.sqrt(v_X1O) + EPS)
            balanced_norm_X11 = norm(mean_X1O * factor_X1O**2)
            tiny = jnp.finfo(mean_X1O.dtype).tiny
            factor_X1O *= norm(mean_X1O) / jnp.maximum(balanced_norm_X11, tiny)
            factor_X1O = whole(factor_X1O)
            return a.on_matrices(lambda u_XIO: u_XIO * factor_X1O, u)

        square = jax.tree.map(averaged, state.square, means)
        return jax.tree.map(balanced, axes, square, means, updates), NeuronState(square)

    return optax.GradientTransformationExtraArgs(init, update)


def normuon(
    axes: Any = None,
    learning_rate: Rate = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    *,
    neuron_decay: Hyperparameter = 0.95,
    newton_schulz: str | NewtonSchulz = "jordan",
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    scale: str = "spectral_max",
    dtype: DTypeLike = "bfloat16",
    buffer_dtype: DTypeLike | None = None,
    cautious_decay: bool = False,
    adam_learning_rate: Rate = 3e-3,
    adam_b1: Hyperparameter = 0.9,
    adam_b2: Hyperparameter = 0.95,
    adam_eps: Hyperparameter = 1e-8,
    adam_weight_decay: Hyperparameter | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds NorMuon for the matrices and AdamW for everything else, as in the trainer.

    Args:
        neuron_decay: see `balance_neurons`. The other arguments are those of `muon`.
    """
    options = {"newton_schulz": newton_schulz, "momentum": momentum, "nesterov": nesterov}
    options |= {"scale": scale, "dtype": dtype, "buffer_dtype": buffer_dtype}
    return complete_optimizer(
        "normuon",
        lambda axes: optax.chain(
            scale_by_muon(axes, **options), balance_neurons(axes, neuron_decay)
        ),
        learning_rate,
        weight_decay,
        AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay),
        axes,
        cautious_decay,
        View("spectral", scale),
    )

"""NorMuon: Muon in which all neurons of a matrix take steps of about equal length.

Source: Li et al. 2025, https://arxiv.org/abs/2510.05491
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.model.trees import AxesTree
from jaxtrain.optim.muon import scale_by_muon
from jaxtrain.optim.precision import average, widest

EPS = 1e-10  # added to the root, as in the source


class NeuronState(NamedTuple):
    square: optax.Updates  # [X,1,O] of each [X,I,O]: mean over inputs of squared directions


def balance_neurons(axes: AxesTree, decay: float = 0.95) -> optax.GradientTransformationExtraArgs:
    """Divides each output's column of Muon's direction by the root of its averaged mean square.

    Each matrix keeps its Frobenius norm, so that Muon's learning rate stays suitable.
    `update(..., good=False)` leaves the state unchanged.

    Args:
        axes: pytree of Axes, like params; every leaf a matrix.
        decay: decay of the average, in [0, 1).

    Raises:
        ValueError: decay is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"optim.neuron_decay must be in [0, 1); got {decay}. Set --optim.neuron_decay."
        )

    def zeros(a, p):
        X, _, O = a.matrix_shape(p.shape)  # noqa: E741
        return jnp.zeros((X, 1, O), widest(p))

    def init(params):
        return NeuronState(jax.tree.map(zeros, axes, params))

    def update(updates, state, params=None, *, good: jax.Array | bool = True, **extra):
        del params, extra

        def averaged(a, v_X1O, u):
            dtype = widest(u, v_X1O)
            mean_X1O = (a.to_matrices(u.astype(dtype)) ** 2).mean(-2, keepdims=True)
            mean_X1O = average(decay, v_X1O, mean_X1O, dtype)
            return jnp.where(good, mean_X1O.astype(v_X1O.dtype), v_X1O)

        def balanced(a, v_X1O, u):
            norm = lambda x: jnp.sqrt(jnp.sum(x**2, (-2, -1), keepdims=True))
            u_XIO = a.to_matrices(u.astype(widest(u, v_X1O)))
            y_XIO = u_XIO / (jnp.sqrt(v_X1O) + EPS)
            tiny = jnp.finfo(u_XIO.dtype).tiny
            return a.from_matrices(y_XIO * (norm(u_XIO) / jnp.maximum(norm(y_XIO), tiny)), u.shape)

        square = jax.tree.map(averaged, axes, state.square, updates)
        return jax.tree.map(balanced, axes, square, updates), NeuronState(square)

    return optax.GradientTransformationExtraArgs(init, update)


def normuon(
    axes: AxesTree,
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    weight_decay: float = 0.1,
    neuron_decay: float = 0.95,
    **options,
) -> optax.GradientTransformation:
    """Builds NorMuon as a complete optimizer without a config; options are scale_by_muon's."""
    return optax.chain(
        scale_by_muon(axes, **options),
        balance_neurons(axes, neuron_decay),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )

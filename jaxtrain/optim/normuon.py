"""NorMuon: Muon whose neurons take steps of one length.

Source: Li et al. 2025, https://arxiv.org/abs/2510.05491
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

EPS = 1e-10  # added to the root, as the source has it


class NeuronState(NamedTuple):
    square: optax.Updates  # [X,1,O] of each [X,I,O]: mean over inputs of squared directions


def balance_neurons(axes, decay=0.95) -> optax.GradientTransformationExtraArgs:
    """Divides each output's column by the root of its averaged mean square.

    Each matrix keeps its Frobenius norm, so rates mean what they mean for Muon. It stands after
    `scale_by_lmo`. `update(..., good=False)` keeps the state.

    Args:
        axes: pytree of Axes, like params; every leaf a matrix.
        decay: of the average, in [0, 1).

    Raises:
        ValueError: decay is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"optim.neuron_decay must be in [0, 1); got {decay}. Set --optim.neuron_decay."
        )

    def neurons(a, p):
        X, _, O = a.matrix_shape(p.shape)  # noqa: E741
        return jnp.zeros((X, 1, O), p.dtype)

    def init(params):
        return NeuronState(jax.tree.map(neurons, axes, params))

    def update(updates, state, params=None, *, good=True, **extra):
        del params, extra

        def averaged(a, v_X1O, u):
            squares = []
            a.on_matrices(lambda u_XIO: squares.append(u_XIO**2) or u_XIO, u)
            mean_X1O = squares[0].mean(-2, keepdims=True)
            return jnp.where(good, decay * v_X1O + (1 - decay) * mean_X1O, v_X1O)

        def balanced(a, v_X1O, u):
            def function(u_XIO):
                norm = lambda x: jnp.sqrt(jnp.sum(x**2, (-2, -1), keepdims=True))
                y_XIO = u_XIO / (jnp.sqrt(v_X1O) + EPS)
                tiny = jnp.finfo(u_XIO.dtype).tiny
                return y_XIO * (norm(u_XIO) / jnp.maximum(norm(y_XIO), tiny))

            return a.on_matrices(function, u)

        square = jax.tree.map(averaged, axes, state.square, updates)
        return jax.tree.map(balanced, axes, square, updates), NeuronState(square)

    return optax.GradientTransformationExtraArgs(init, update)

"""Makes an optimizer add in another order, which shows how much its rounding changes the updates.

If the rows and columns of a matrix are permuted, Muon's and Adam's updates are permuted alike, in
exact arithmetic. In Newton-Schulz the sums then run in another order. In bfloat16 a sum near the
middle of two numbers may round either way, and small singular values are amplified up to 480 times,
their errors included. Another framework's kernels differ from ours in the same way.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.model.trees import AxesTree


def reorder(
    optimizer: optax.GradientTransformationExtraArgs, axes: AxesTree, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Returns an equal optimizer that adds along rows and columns of matrices in another order.

    Args:
        optimizer: without injected noise, which is drawn by position.
        axes: pytree of Axes, like params.
        seed: of the order.
    """

    def permute(tree: Any, inverse: bool = False) -> Any:
        def move(a, x):
            for dim in range(len(a.stack), x.ndim) if a.is_matrix else ():
                order = np.random.default_rng((seed, dim)).permutation(x.shape[dim])
                x = jnp.take(x, np.argsort(order) if inverse else order, dim)
            return x

        return jax.tree.map(move, axes, tree)

    def init(params):
        return optimizer.init(permute(params))

    def update(updates, state, params=None, **extra):
        assert params is not None, "build_optimizer's optimizers need params"
        moves, state = optimizer.update(permute(updates), state, permute(params), **extra)
        return permute(moves, inverse=True), state

    return optax.GradientTransformationExtraArgs(init, update)


class ExaggeratedState(NamedTuple):
    """Two states with different keys draw different directions."""

    state: Any  # of the optimizer
    key: jax.Array


def exaggerate(
    optimizer: optax.GradientTransformationExtraArgs,
    exact: optax.GradientTransformationExtraArgs,
    factor: float,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer with more rounding errors: `factor` times its own, up or down at random.

    Reordering shows too little of a bfloat16 iteration: in most steps both orders round alike, and
    in a few the norm of a matrix, and with it every entry, is rounded to the next number.

    Args:
        exact: rounds less, and has an equal state.
    """

    def init(params):
        return ExaggeratedState(optimizer.init(params), jax.random.key(0))

    def update(updates, state, params=None, **extra):
        state, key = state
        rounded, new = optimizer.update(updates, state, params, **extra)
        better, _ = exact.update(updates, state, params, **extra)
        leaves, structure = jax.tree.flatten(rounded)
        key, *keys = jax.random.split(key, 1 + len(leaves))

        def move(r, b, key):
            return r + factor * jax.random.rademacher(key, r.shape, r.dtype) * (r - b)

        moved = jax.tree.map(move, rounded, better, jax.tree.unflatten(structure, keys))
        return moved, ExaggeratedState(new, key)

    return optax.GradientTransformationExtraArgs(init, update)

"""Unit steps in a chosen norm: the linear minimisation oracle (LMO) of averaged gradients.

The oracle returns the -u that minimises <g, .> over the norm's unit ball: of all steps of length 1
it decreases the linearised loss most. Muon, the oracle of the spectral norm, is in muon.py.

Source: Pethick et al. 2025, https://arxiv.org/abs/2502.07529 ("Scion"), its Table 1
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import ArrayTree, AxesTree
from jaxtrain.optim import Hyperparameter, check_decay, select_option
from jaxtrain.optim.precision import average, widest, zero_buffers

MatrixFunction = Callable[[jax.Array], jax.Array]  # [X,I,O] -> [X,I,O], matrix by matrix


def _normalize(x_XIO, dims, length):
    """Scales x to a 2-norm of `length` along dims; zeros stay zeros."""
    wide = x_XIO.astype(jnp.promote_types(x_XIO.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(wide), dims, keepdims=True)
    wide = wide / jnp.maximum(largest, jnp.finfo(wide.dtype).tiny)  # squares stay in range
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), dims, keepdims=True))
    return (length * wide / jnp.maximum(norm, 0.5)).astype(x_XIO.dtype)  # norm is 0 or at least 1


def sign(x_XIO: jax.Array) -> jax.Array:
    """Sets every entry to +-1/I: the unit step if the norm is I times the largest entry (head)."""
    return jnp.sign(x_XIO) / x_XIO.shape[-2]


def column_norm(x_XIO: jax.Array) -> jax.Array:
    """Scales each input's outputs to RMS 1: the operator norm one-hot -> RMS (an embedding)."""
    return _normalize(x_XIO, -1, x_XIO.shape[-1] ** 0.5)


def row_norm(x_XIO: jax.Array) -> jax.Array:
    """Scales each output's inputs to 2-norm 1/sqrt(I): the operator norm RMS -> largest output."""
    return _normalize(x_XIO, -2, x_XIO.shape[-2] ** -0.5)


def frobenius(x_XIO: jax.Array) -> jax.Array:
    """Scales each matrix or vector to RMS 1 (a bias or gain)."""
    return _normalize(x_XIO, (-2, -1), (x_XIO.shape[-2] * x_XIO.shape[-1]) ** 0.5)


# Names as in the literature, where a weight is [outputs, inputs]. "spectral" is in muon.py.
GEOMETRIES = {
    "sign": sign,
    "column_norm": column_norm,
    "row_norm": row_norm,
    "frobenius": frobenius,
}

# (inputs, outputs) -> factor of the unit step. torch.optim.Muon calls spectral_max "original" and
# match_rms "match_rms_adamw". Source of match_rms: Liu et al. 2025, https://arxiv.org/abs/2502.16982
SCALES = {
    "spectral_max": lambda inputs, outputs: math.sqrt(max(1.0, outputs / inputs)),
    "spectral": lambda inputs, outputs: math.sqrt(outputs / inputs),
    "match_rms": lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),
    "none": lambda inputs, outputs: 1.0,
}


class LmoState(NamedTuple):
    momentum: optax.Updates  # like params


def buffer_dtype(cfg: OptimConfig) -> DTypeLike | None:
    """Returns the type of momentum and acceleration buffers; None as in `zero_buffers`."""
    return jnp.bfloat16 if cfg.narrow_buffers else None


def map_in_place(function: MatrixFunction, axes: AxesTree, tree: ArrayTree) -> ArrayTree:
    """Applies a function to the matrices of each leaf, without moving them between devices."""
    return jax.tree.map(lambda a, x: a.on_matrices(function, x), axes, tree)


def build_unit_step(
    geometry: str | MatrixFunction,
    scale: str = "spectral_max",
    dtype: DTypeLike = jnp.bfloat16,
    per_head: bool = False,
    map_matrices: Callable[[MatrixFunction, AxesTree, ArrayTree], ArrayTree] = map_in_place,
) -> Callable[[AxesTree, ArrayTree], ArrayTree]:
    """Builds step(axes, tree), which returns each matrix's unit step times the factor of its shape.

    Args:
        geometry: a key of GEOMETRIES, or a function such as NewtonSchulz().
        scale: a key of SCALES.
        dtype: type in which the geometry computes; float64 leaves stay float64.
        per_head: treats the slice of each head as a separate matrix.
        map_matrices: applies the geometry to a tree; on a mesh use `build_sharded_map`.

    Raises:
        ValueError: geometry or scale is not in its table, or dtype is not a floating type.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating type; got {dtype}. Set dtype.")
    factor = select_option(SCALES, scale, "optim.scale", "scale")
    unit = geometry
    if not callable(unit):
        unit = select_option(GEOMETRIES, unit, "optim.geometry", "geometry")

    def narrow(axes, x):  # before the all-to-all on a mesh, which then moves half the bytes
        x = x.astype(jnp.float64 if x.dtype == jnp.float64 else dtype)
        return axes.split_heads(x)[1] if per_head else x

    def scaled(axes, view, y, x):
        _, inputs, outputs = view.matrix_shape(y.shape)
        y = axes.merge_heads(y) if per_head else y
        return factor(inputs, outputs) * y.astype(x.dtype)

    def step(axes, tree):
        views = jax.tree.map(Axes.head_axes, axes) if per_head else axes
        units = map_matrices(unit, views, jax.tree.map(narrow, axes, tree))
        return jax.tree.map(scaled, axes, views, units, tree)

    return step


def scale_by_lmo(
    axes: AxesTree,
    geometry: str | MatrixFunction,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    buffer_dtype: DTypeLike | None = None,
    **options,
) -> optax.GradientTransformationExtraArgs:
    """Averages gradients into a momentum, then takes each matrix's unit step.

    Steps have the widest type of gradient, momentum and parameter, float32 at least.
    `update(..., good=False)` leaves the state unchanged.

    Args:
        axes: pytree of Axes, like params; Axes.matrix_shape defines the matrices of vectors.
        geometry: see `build_unit_step`.
        momentum: decay of the averaged gradient, in [0, 1).
        nesterov: averages the gradient into the momentum a second time before the step.
        buffer_dtype: type of the momentum; None means the parameter's, float32 at least.
        options: further arguments of `build_unit_step`.

    Raises:
        ValueError: momentum is outside [0, 1), or an option is not in its table.
    """
    check_decay(momentum, "momentum", "optim.momentum")
    step = build_unit_step(geometry, **options)

    def init(params):
        return LmoState(zero_buffers(params, buffer_dtype))

    def update(updates, state, params=None, *, good=True, **extra):
        del extra
        types = jax.tree.map(widest, updates, state.momentum, updates if params is None else params)
        blend = lambda m, g, dtype: average(momentum, m, g, dtype)
        # `good` is applied inside the average, so that XLA overwrites the old momentum with the new
        # one. Applied after the update it would need both.
        guarded = lambda m, *rest: jnp.where(good, blend(m, *rest).astype(m.dtype), m)
        mean = jax.tree.map(guarded, state.momentum, updates, types)
        last = lambda m, _, dtype: m.astype(dtype)
        ahead = jax.tree.map(blend if nesterov else last, mean, updates, types)
        return step(axes, ahead), LmoState(mean)

    return optax.GradientTransformationExtraArgs(init, update)

"""Steps of unit length in a chosen norm: the linear minimisation oracle of averaged gradients.

The oracle's answer -u minimises <g, .> over the norm's unit ball. Muon is the spectral norm's: each
matrix replaced by its nearest semi-orthogonal one.

Source: Pethick et al. 2025, https://arxiv.org/abs/2502.07529 ("Scion"), its Table 1;
Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.axes import Axes
from jaxtrain.optim import pick
from jaxtrain.optim.newton_schulz import orthogonalize


def _over(x_XIO, dims, size):
    """x over its 2-norm along dims, times size; any scale of x gives the same, and zeros zeros."""
    wide = x_XIO.astype(jnp.promote_types(x_XIO.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(wide), dims, keepdims=True)
    wide = wide / jnp.maximum(largest, jnp.finfo(wide.dtype).tiny)  # squares stay in range
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), dims, keepdims=True))
    return (size * wide / jnp.maximum(norm, 0.5)).astype(x_XIO.dtype)  # norm is 0 or at least 1


def sign(x_XIO):
    """RMS -> largest output (a head): every entry +-1/I."""
    return jnp.sign(x_XIO) / x_XIO.shape[-2]


def column_norm(x_XIO):
    """One-hot -> RMS (an embedding): the outputs of each input have RMS 1."""
    return _over(x_XIO, -1, x_XIO.shape[-1] ** 0.5)


def row_norm(x_XIO):
    """RMS -> largest output, by rows: the inputs of each output have 2-norm 1/sqrt(I)."""
    return _over(x_XIO, -2, x_XIO.shape[-2] ** -0.5)


def frobenius(x_XIO):
    """RMS (a bias or gain): each matrix or vector has RMS 1."""
    return _over(x_XIO, (-2, -1), (x_XIO.shape[-2] * x_XIO.shape[-1]) ** 0.5)


# Names as for a weight of [outputs, inputs], as the literature has them. "spectral" has options.
GEOMETRIES = {
    "sign": sign,
    "column_norm": column_norm,
    "row_norm": row_norm,
    "frobenius": frobenius,
}

# (inputs, outputs) -> factor of the unit step. torch.optim.Muon calls spectral_max "original" and
# match_rms "match_rms_adamw"; the latter's source: Liu et al. 2025, https://arxiv.org/abs/2502.16982
SCALES = {
    "spectral_max": lambda inputs, outputs: math.sqrt(max(1.0, outputs / inputs)),
    "spectral": lambda inputs, outputs: math.sqrt(outputs / inputs),
    "match_rms": lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),
    "none": lambda inputs, outputs: 1.0,
}


class LmoState(NamedTuple):
    momentum: optax.Updates  # like params


def on_each(function, axes, tree):
    """function: [X,I,O] -> [X,I,O], of the matrices of each leaf, where they are."""
    return jax.tree.map(lambda a, x: a.on_matrices(function, x), axes, tree)


def _unit(geometry, spectral):
    """unit(x_XIO): each matrix's step of length 1, in the type of x."""
    if callable(geometry):
        return geometry
    if geometry != "spectral":
        return pick(GEOMETRIES, geometry, "optim.geometry")
    return lambda x_XIO: orthogonalize(x_XIO, dtype=x_XIO.dtype, **spectral)


def build_unit_step(
    geometry="spectral",
    scale="spectral_max",
    dtype=jnp.bfloat16,
    per_head=False,
    over=on_each,
    **spectral,
):
    """step(axes, tree): each matrix replaced by its unit step, times the factor of its shape.

    Args:
        geometry: "spectral", a key of GEOMETRIES, or a function [X,I,O] -> [X,I,O].
        scale: a key of SCALES.
        dtype: of what the geometry is given; float64 leaves stay float64.
        per_head: every head's slice is a matrix of its own.
        over: (function, axes, tree) -> tree, as `on_each`; `owners.on_owners` on a mesh.
        spectral: options of `orthogonalize`.

    Raises:
        ValueError: geometry or scale is not in its table.
    """
    factor, unit = pick(SCALES, scale, "optim.scale"), _unit(geometry, spectral)

    def narrow(axes, x):  # before it travels
        x = x.astype(jnp.float64 if x.dtype == jnp.float64 else dtype)
        return axes.split_heads(x)[1] if per_head else x

    def scaled(axes, view, y, x):
        _, inputs, outputs = view.matrix_shape(y.shape)
        y = axes.merge_heads(y) if per_head else y
        return factor(inputs, outputs) * y.astype(x.dtype)

    def step(axes, tree):
        views = jax.tree.map(Axes.of_heads, axes) if per_head else axes
        units = over(unit, views, jax.tree.map(narrow, axes, tree))
        return jax.tree.map(scaled, axes, views, units, tree)

    return step


def scale_by_lmo(
    axes, geometry="spectral", momentum=0.95, nesterov=True, buffer_dtype=None, **options
) -> optax.GradientTransformationExtraArgs:
    """Momentum as an average, then each matrix's unit step in the norm of `geometry`.

    With the defaults the direction is torch.optim.Muon's. `update(..., good=False)` keeps the
    state.

    Args:
        axes: pytree of Axes, like params; what is no matrix is seen as Axes.matrix_shape says.
        momentum: decay of the averaged gradient, in [0, 1).
        nesterov: mixes the gradient into the average once more.
        buffer_dtype: of the momentum; None is the parameter's.
        options: of `build_unit_step`.

    Raises:
        ValueError: momentum is outside [0, 1), or an option is not in its table.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"optim.momentum must be in [0, 1); got {momentum}. Set --optim.momentum.")
    step = build_unit_step(geometry, **options)

    def average(m, g):
        return momentum * m.astype(g.dtype) + (1 - momentum) * g

    def kept(good):  # inside the average, so that it is made in m's own buffer
        return lambda m, g: jnp.where(good, average(m, g).astype(m.dtype), m)

    def init(params):
        return LmoState(optax.tree.zeros_like(params, dtype=buffer_dtype))

    def update(grads, state, params=None, *, good=True, **extra):
        del params, extra
        mean = jax.tree.map(kept(good), state.momentum, grads)
        ahead = jax.tree.map(average, mean, grads) if nesterov else mean
        return step(axes, ahead), LmoState(mean)

    return optax.GradientTransformationExtraArgs(init, update)

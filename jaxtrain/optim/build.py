"""build_optimizer: clip, then each group's direction, then its rate and decay.

Matrices go to the optimizer that `optim.name` says; embeddings, head and vectors go to AdamW. The
axes string alone decides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.axes import Axes
from jaxtrain.mesh import owner_layout, param_sharding
from jaxtrain.optim import pick
from jaxtrain.optim.adam import scale_by_adam
from jaxtrain.optim.muon import scale_by_muon
from jaxtrain.optim.orthogonalize import CHUNK_BYTES
from jaxtrain.optim.schedule import build_schedule

MATRICES, REST = "matrices", "rest"


class Rule(NamedTuple):
    """How the matrices' direction is built, and the OptimConfig field that is their peak rate."""

    build: Callable  # (OptimConfig, axes, mesh) -> GradientTransformation
    rate: str


def _muon(cfg, axes, mesh):
    placement = {}
    if mesh is not None and mesh.size > 1:
        placement["place"] = owner_layout(mesh)
        at = lambda axes: (
            lambda a, x: jax.lax.with_sharding_constraint(x, param_sharding(a, x.shape, mesh, axes))
        )
        placement["rest"] = at(("fsdp", "tensor"))
        if mesh.shape["tensor"] > 1:
            placement["via"] = at(("fsdp",))
        placement["chunk_bytes"] = CHUNK_BYTES if mesh.shape["fsdp"] == 1 else 0
    return scale_by_muon(
        axes,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        steps=cfg.ns_steps,
        scale=cfg.muon_scale,
        dtype=jnp.dtype(cfg.ns_dtype),
        **placement,
    )


def _adamw(cfg, axes=None, mesh=None):
    del axes, mesh
    return scale_by_adam(cfg.adam_b1, cfg.adam_b2, cfg.adam_eps)


OPTIMIZERS = {
    "muon": Rule(_muon, "learning_rate"),
    "adamw": Rule(_adamw, "adam_learning_rate"),
}


@dataclass(frozen=True)
class Group:
    """What one parameter's step follows: a key of OPTIMIZERS, its peak rate, its decay."""

    name: str  # MATRICES or REST
    optimizer: str
    rate: float
    decay: float


def group_of(cfg, axes: Axes) -> Group:
    """The group of a parameter. Matrices, embedding and head (with a V) decay, vectors do not."""
    optimizer = cfg.name if axes.is_matrix else "adamw"
    rate = getattr(cfg, pick(OPTIMIZERS, optimizer, "optim.name").rate)
    decay = cfg.weight_decay if axes.is_matrix or "V" in axes.letters else 0.0
    return Group(MATRICES if axes.is_matrix else REST, optimizer, rate, decay)


def _named_leaves(tree) -> dict:
    """`{"blocks.wq": leaf}`; None is a leaf, so that a missing one is seen."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _check_axes(axes) -> None:
    for name, leaf in _named_leaves(axes).items():
        if not isinstance(leaf, Axes):
            raise ValueError(f"every parameter must have Axes; got {name}={leaf!r}. Set its axes.")


def _check_same_names(axes, params) -> None:
    named, wanted = set(_named_leaves(axes)), set(_named_leaves(params))
    if named != wanted:
        missing, extra = sorted(wanted - named), sorted(named - wanted)
        raise ValueError(f"axes must name the parameters; got missing={missing}, extra={extra}.")


class RateState(NamedTuple):
    count: jax.Array  # int32 [], updates made: what every group's rate follows


def _scale_by_rate(groups, schedule) -> optax.GradientTransformationExtraArgs:
    """u -> -rate * schedule(count) * (u + decay * p), each leaf with its group's rate and decay."""

    def init(params):
        del params
        return RateState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, good=True, **extra):
        del extra
        scale = schedule(state.count)

        def step(group, u, p):
            decayed = u + group.decay * p if group.decay else u
            return jnp.where(good, (-group.rate * scale).astype(u.dtype) * decayed, 0)

        updates = jax.tree.map(step, groups, updates, params)
        return updates, RateState(state.count + jnp.where(good, 1, 0))

    return optax.GradientTransformationExtraArgs(init, update)


def build_optimizer(cfg, axes, mesh=None) -> optax.GradientTransformationExtraArgs:
    """The optimizer of an OptimConfig; `update` needs params.

    `update(..., good=False)` gives updates of zero and the state as it was, whatever the gradients
    hold: a step that is not finite.

    Args:
        axes: pytree of Axes, like params.
        mesh: where params are split; None is one device.

    Raises:
        ValueError: a leaf of axes is not an Axes, an optimizer or schedule is unknown, or (at
            init) axes and params do not name the same parameters.
    """
    _check_axes(axes)
    groups = jax.tree.map(lambda a: group_of(cfg, a), axes)
    names = jax.tree.map(lambda group: group.name, groups)
    only_matrices = jax.tree.map(lambda a: a if a.is_matrix else optax.MaskedNode(), axes)
    rule = pick(OPTIMIZERS, cfg.name, "optim.name")
    directions = {MATRICES: rule.build(cfg, only_matrices, mesh), REST: _adamw(cfg)}
    transform = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.partition(directions, names),
        _scale_by_rate(groups, build_schedule(cfg)),
    )

    def init(params):
        _check_same_names(axes, params)
        return transform.init(params)

    return optax.GradientTransformationExtraArgs(init, transform.update)


def state_shardings(optimizer, params, param_shardings, replicated):
    """Shardings of optimizer.init(params): moments rest where their parameter does.

    A leaf of the state belongs to the parameter whose path ends its own path and whose shape it
    has, so wrappers around the optimizer need nothing here.

    Args:
        params: pytree of arrays or ShapeDtypeStructs.
        param_shardings: like params.
        replicated: sharding of all else (counts).
    """
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    shardings = dict(jax.tree_util.tree_leaves_with_path(param_shardings))

    def find(path, leaf):
        ends = (path[i:] for i in range(len(path)))
        owners = (end for end in ends if shapes.get(end) == leaf.shape)
        return shardings.get(next(owners, None), replicated)

    return jax.tree_util.tree_map_with_path(find, jax.eval_shape(optimizer.init, params))


def eval_params(opt_state, params):
    """The weights to evaluate, export and sample with: these optimizers take gradients at them."""
    del opt_state
    return params


def group_rms(updates, axes) -> dict:
    """`{"optim/matrices/update_rms": float32 [], ...}` of the groups that have parameters."""
    squares, sizes = {}, {}
    for a, u in zip(jax.tree.leaves(axes), jax.tree.leaves(updates), strict=True):
        name = MATRICES if a.is_matrix else REST
        squares[name] = squares.get(name, 0.0) + jnp.sum(jnp.square(u.astype(jnp.float32)))
        sizes[name] = sizes.get(name, 0) + u.size
    return {f"optim/{name}/update_rms": jnp.sqrt(squares[name] / sizes[name]) for name in sizes}


class Row(NamedTuple):
    """One parameter as the optimizer sees it."""

    name: str
    axes: str
    shape: str  # [X,I,O] of a matrix, else the array's
    group: str
    optimizer: str
    rate: float
    decay: float


def group_table(cfg, axes, params) -> list[Row]:
    """A row for each parameter; params may be ShapeDtypeStructs."""
    _check_axes(axes)
    _check_same_names(axes, params)
    rows, shapes = [], _named_leaves(params)
    for name, a in _named_leaves(axes).items():
        g = group_of(cfg, a)
        shape = a.matrix_shape(shapes[name].shape) if a.is_matrix else shapes[name].shape
        shown = "x".join(map(str, shape))
        rows.append(Row(name, str(a), shown, g.name, g.optimizer, g.rate, g.decay))
    return rows


def format_group_table(rows: list[Row]) -> str:
    """Aligned columns under a header."""
    cells = [Row._fields] + [(*row[:-2], f"{row.rate:g}", f"{row.decay:g}") for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in padded)

"""Parameter groups: which optimizer, norm, rate and decay a parameter gets, by its axes string."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import optax

from jaxtrain.axes import Axes
from jaxtrain.config.sections import NORM_PRESERVING, OptimConfig
from jaxtrain.model.trees import ArrayTree, AxesTree, named_leaves
from jaxtrain.optim import Hyperparameter
from jaxtrain.optim.lmo import SCALES
from jaxtrain.optim.parametrisation import has_own_head, step_factors

MATRICES, REST = "matrices", "rest"
ADAM_SIZED = ("adamw", "soap")  # values of optim.name whose steps are as long as Adam's
# Muown's lengths of rows are variables, which its source does not decay.
WITHOUT_DECAY = (*NORM_PRESERVING, "muown")

# With optim.rest=lmo: role -> (norm, peak rate as a multiple of the matrices'). The multiples are
# ratios of the source's radii at 124M. Source: Pethick et al. 2025, https://arxiv.org/abs/2502.07529
FULL_GEOMETRY = {
    "embedding": ("column_norm", 1.0),
    "head": ("sign", 60.0),
    "vector": ("frobenius", 1.0),
}


@dataclass(frozen=True)
class Group:
    """How a set of parameters is stepped."""

    name: str  # MATRICES, REST or, with optim.rest=lmo or a separate rate, a role
    optimizer: str  # optim.name, "adamw" or "lmo"
    geometry: str  # norm of the step; empty with AdamW and SOAP
    rate: Hyperparameter  # peak
    decay: Hyperparameter


def decay_group_of(axes: Axes) -> str:
    """Returns the entry of optim.decay_groups that a parameter belongs to."""
    if "T" in axes.stack:
        return "positions"
    return {"matrix": MATRICES, "vector": "vectors"}.get(axes.role, axes.role)


def group_of(cfg: OptimConfig, axes: Axes) -> Group:
    """Returns a parameter's group."""
    decays = decay_group_of(axes) in cfg.decaying
    decay = cfg.weight_decay if decays else 0.0
    if axes.is_matrix and cfg.name not in ADAM_SIZED:
        geometry = "" if cfg.name == "adam_h" else cfg.geometry
        decay = 0.0 if cfg.name in WITHOUT_DECAY else decay
        return Group(MATRICES, cfg.name, geometry, cfg.learning_rate, decay)
    if axes.is_matrix or cfg.rest == "adamw":
        own_rate = cfg.adam_rates.get(axes.role, 0.0)
        if axes.is_matrix:
            name, optimizer = MATRICES, cfg.name
        else:  # a role with its own rate is a separate group
            name, optimizer = axes.role if own_rate else REST, "adamw"
            decay = cfg.adam_weight_decay if decays and cfg.adam_weight_decay else decay
        return Group(name, optimizer, "", own_rate or cfg.adam_learning_rate, decay)
    geometry, ratio = FULL_GEOMETRY[axes.role]
    return Group(axes.role, "lmo", geometry, ratio * cfg.learning_rate, decay)


def check_axes(axes: AxesTree) -> None:
    """Raises ValueError if a leaf is not an Axes."""
    for name, leaf in named_leaves(axes).items():
        if not isinstance(leaf, Axes):
            raise ValueError(f"every parameter must have Axes; got {name}={leaf!r}. Set its axes.")


def check_axes_fit(axes: AxesTree, params: ArrayTree) -> None:
    """Raises ValueError if axes do not name exactly the parameters or do not fit their shapes."""
    named, shapes = named_leaves(axes), {name: x.shape for name, x in named_leaves(params).items()}
    if set(named) != set(shapes):
        missing, extra = sorted(set(shapes) - set(named)), sorted(set(named) - set(shapes))
        raise ValueError(f"axes must name the parameters; got missing={missing}, extra={extra}.")
    for name, a in named.items():
        a.check_shape(name, shapes[name])


def select_group(names: Any, name: str, tree: Any) -> Any:
    """Replaces other groups' leaves by optax.MaskedNodes, which have no leaves.

    Args:
        names: pytree of groups' names, like params.
        name: of the group.
        tree: any pytree like params.
    """
    return jax.tree.map(lambda n, x: x if n == name else optax.MaskedNode(), names, tree)


class GroupRow(NamedTuple):
    """One parameter as the optimizer sees it."""

    name: str
    axes: str
    view: str  # [X,I,O] where the step has a norm, else the array's shape
    group: str
    optimizer: str
    geometry: str = ""
    scale: float = 1.0  # factor of the unit step, from the view
    rate: Hyperparameter | str = ""  # peak; in words if the program computes it
    decay: Hyperparameter | str = ""


def build_row(
    name: str, axes: Axes, shape: Sequence[int], group: Group, scale: str, per_head: bool = False
) -> GroupRow:
    """Returns a parameter's row; scale and per_head are those of build_unit_step, for matrices."""
    view, factor, keeps_norm = tuple(shape), 1.0, group.optimizer in NORM_PRESERVING
    if group.geometry or keeps_norm:
        view = axes.matrix_shape(shape)
    if (group.geometry or keeps_norm) and group.name == MATRICES:
        if per_head:
            sizes = dict(zip(axes.letters, shape, strict=True))
            heads = axes.head_axes()
            view = heads.matrix_shape(heads.shape(sizes))
        if not keeps_norm:  # otherwise the step's length is a share of the norm
            factor = SCALES[scale](*view[1:])
    return GroupRow(
        name=name,
        axes=str(axes),
        view="x".join(map(str, view)),
        group=group.name,
        optimizer=group.optimizer,
        geometry=group.geometry,
        scale=factor,
        rate=group.rate,
        decay=group.decay,
    )


def group_table(cfg: OptimConfig, axes: AxesTree, params: ArrayTree) -> list[GroupRow]:
    """Returns a row for each parameter; params may be ShapeDtypeStructs."""
    check_axes(axes)
    check_axes_fit(axes, params)
    arrays, has_head = named_leaves(params), has_own_head(axes)

    def row(name, a):
        shape, group = arrays[name].shape, group_of(cfg, a)
        step = step_factors(cfg, name, a, shape, has_head).step
        # rate * decay does not depend on the model's size
        group = replace(group, rate=group.rate * step, decay=group.decay / step)
        return build_row(name, a, shape, group, cfg.scale, cfg.per_head)

    return [row(name, a) for name, a in named_leaves(axes).items()]


def format_group_table(rows: list[GroupRow]) -> str:
    """Returns the rows as text: aligned columns under a header."""
    cell = lambda x: f"{x:.4g}" if isinstance(x, float) else x or "-"
    cells = [GroupRow._fields] + [tuple(map(cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in padded)

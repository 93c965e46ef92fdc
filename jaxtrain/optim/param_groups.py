"""Parameter groups: which optimizer, norm, rate and decay a parameter gets, by its axes string."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import ArrayTree, AxesTree, named_leaves
from jaxtrain.optim.lmo import SCALES
from jaxtrain.optim.parametrisation import has_own_head, step_factors

MATRICES, REST = "matrices", "rest"
ADAM_SIZED = ("adamw", "soap")  # values of optim.name whose steps are as long as Adam's
NORM_PRESERVING = "muon_h", "adam_h"  # values of optim.name whose matrices keep their norms

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

    name: str  # MATRICES, REST or, with optim.rest=lmo, a role
    optimizer: str  # optim.name, "adamw" or "lmo"
    geometry: str  # norm of the step; empty with AdamW and SOAP
    rate: float  # peak
    decay: float


def decay_group_of(axes: Axes) -> str:
    """Returns the entry of optim.decay_groups that a parameter belongs to."""
    if "T" in axes.stack:
        return "positions"
    return {"matrix": MATRICES, "vector": "vectors"}.get(axes.role, axes.role)


def group_of(cfg: OptimConfig, axes: Axes) -> Group:
    """Returns a parameter's group."""
    decay = cfg.weight_decay if decay_group_of(axes) in cfg.decaying else 0.0
    if axes.is_matrix and cfg.name not in ADAM_SIZED:
        geometry = "" if cfg.name == "adam_h" else cfg.geometry
        decay = 0.0 if cfg.name in NORM_PRESERVING else decay
        return Group(MATRICES, cfg.name, geometry, cfg.learning_rate, decay)
    if axes.is_matrix or cfg.rest == "adamw":
        name, optimizer = (MATRICES, cfg.name) if axes.is_matrix else (REST, "adamw")
        return Group(name, optimizer, "", cfg.adam_learning_rate, decay)
    geometry, ratio = FULL_GEOMETRY[axes.role]
    return Group(axes.role, "lmo", geometry, ratio * cfg.learning_rate, decay)


def check_axes(axes: AxesTree) -> None:
    """Raises ValueError if a leaf is not an Axes."""
    for name, leaf in named_leaves(axes).items():
        if not isinstance(leaf, Axes):
            raise ValueError(f"every parameter must have Axes; got {name}={leaf!r}. Set its axes.")


def check_same_names(axes: AxesTree, params: ArrayTree) -> None:
    """Raises ValueError if a parameter has no axes, or axes have no parameter."""
    named, wanted = set(named_leaves(axes)), set(named_leaves(params))
    if named != wanted:
        missing, extra = sorted(wanted - named), sorted(named - wanted)
        raise ValueError(f"axes must name the parameters; got missing={missing}, extra={extra}.")


class GroupRow(NamedTuple):
    """One parameter as the optimizer sees it."""

    name: str
    axes: str
    view: str  # [X,I,O] where the step has a norm, else the array's shape
    group: str
    optimizer: str
    geometry: str
    scale: float  # factor of the unit step, from the view
    rate: float
    decay: float


def _row(cfg, name, axes, shape, has_head) -> GroupRow:
    group, view, scale = group_of(cfg, axes), shape, 1.0
    step = step_factors(cfg, name, axes, shape, has_head).step
    if group.geometry or group.optimizer in NORM_PRESERVING:
        view = axes.matrix_shape(shape)
    if (group.geometry or group.optimizer in NORM_PRESERVING) and group.name == MATRICES:
        if cfg.per_head:
            sizes = dict(zip(axes.letters, shape, strict=True))
            heads = axes.head_axes()
            view = heads.matrix_shape(heads.shape(sizes))
        if cfg.name not in NORM_PRESERVING:  # their step's length is a share of the norm
            scale = SCALES[cfg.scale](*view[1:])
    return GroupRow(
        name=name,
        axes=str(axes),
        view="x".join(map(str, view)),
        group=group.name,
        optimizer=group.optimizer,
        geometry=group.geometry,
        scale=scale,
        rate=group.rate * step,
        decay=group.decay / step,  # rate * decay does not depend on the model's size
    )


def group_table(cfg: OptimConfig, axes: AxesTree, params: ArrayTree) -> list[GroupRow]:
    """Returns a row for each parameter; params may be ShapeDtypeStructs."""
    check_axes(axes)
    check_same_names(axes, params)
    shapes = named_leaves(params)
    has_head = has_own_head(axes)
    named = named_leaves(axes).items()
    return [_row(cfg, name, a, shapes[name].shape, has_head) for name, a in named]


def format_group_table(rows: list[GroupRow]) -> str:
    """Returns the rows as text: aligned columns under a header."""
    cell = lambda x: f"{x:.4g}" if isinstance(x, float) else x or "-"
    cells = [GroupRow._fields] + [tuple(map(cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in padded)

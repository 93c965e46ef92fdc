"""Prints how an optimizer steps each parameter."""

from collections.abc import Callable
from contextvars import ContextVar

import jax
import optax

from jaxtrain.model.trees import ArrayTree
from jaxtrain.optim.default_axes import named_params
from jaxtrain.optim.param_groups import GroupRow, format_group_table

# Rows that optimizers report while describe() runs; None at other times. An optimizer inside any
# chain, mask or wrapper is thus described, as all of them call its init.
_rows: ContextVar[list[GroupRow] | None] = ContextVar("rows", default=None)


def report_groups(rows: Callable[[], list[GroupRow]]) -> None:
    """Passes an optimizer's rows to describe(), if it runs; every optimizer's init calls this."""
    reported = _rows.get()
    if reported is not None:
        reported += rows()


def group_rows(optimizer: optax.GradientTransformation, params: ArrayTree) -> list[GroupRow]:
    """Returns a row for each parameter; no array is created.

    Args:
        optimizer: a complete optimizer, alone or inside other optax transforms.
        params: arrays or ShapeDtypeStructs, as for optimizer.init.

    Raises:
        ValueError: the optimizer has no parameter groups, for example because it is optax's.
    """
    token = _rows.set([])
    try:
        jax.eval_shape(optimizer.init, params)
        rows = _rows.get() or []
    finally:
        _rows.reset(token)
    if not rows:
        raise ValueError(
            "optimizer must come from jaxtrain.optim.recipes or build_optimizer to be described; "
            f"got {optimizer}."
        )
    known = {row.name for row in rows}
    others = [
        GroupRow(name, "", "x".join(map(str, x.shape)), "", "another transform")
        for name, x in named_params(params)[0]
        if name not in known
    ]
    return rows + others


def describe(optimizer: optax.GradientTransformation, params: ArrayTree) -> None:
    """Prints a table of each parameter's axes, optimizer, rate and decay.

    Args and errors are those of `group_rows`.
    """
    print(format_group_table(group_rows(optimizer, params)))

"""Completes a direction of matrices to an optimizer of every parameter, without a config.

Each recipe, such as `muon`, is one call of `complete_optimizer`. As in the trainer, matrices follow
the recipe's direction and everything else follows AdamW.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxtrain.axes import Axes
from jaxtrain.model.trees import AxesTree
from jaxtrain.optim import Hyperparameter, check_number, check_rate, is_number
from jaxtrain.optim.adam import scale_by_adam
from jaxtrain.optim.default_axes import build_for_params, named_params, resolve_axes
from jaxtrain.optim.describe import report_groups
from jaxtrain.optim.param_groups import (
    MATRICES,
    REST,
    WITHOUT_DECAY,
    Group,
    GroupRow,
    build_row,
    decay_group_of,
    select_group,
)
from jaxtrain.optim.rate_step import Schedule, scale_by_rate

Rate = Hyperparameter | optax.Schedule
Transform: TypeAlias = optax.GradientTransformation
# build(direction, groups, axes, schedule) of an optimizer of matrices; the last three are as in
# `keep_norms`.
Stepper = Callable[[optax.GradientTransformationExtraArgs, Any, AxesTree, Schedule], Transform]


class AdamW(NamedTuple):
    """How parameters that are not matrices are stepped; the defaults are the trainer's."""

    learning_rate: Rate = 3e-3
    b1: Hyperparameter = 0.9
    b2: Hyperparameter = 0.95
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter | None = None  # of embeddings and heads; None: the matrices'

    def check(self) -> None:
        """Checks the rate and the decay; scale_by_adam checks the others."""
        check_rate(self.learning_rate, "adam_learning_rate")
        if self.weight_decay is not None:
            check_number(self.weight_decay, "adam_weight_decay")


class View(NamedTuple):
    """What `describe` prints about a direction: its norm, and the factor of a matrix' shape."""

    geometry: str = ""
    scale: str = "none"  # a key of SCALES
    per_head: bool = False


def _share_of_peak(rate: Rate) -> Schedule:
    """Returns a schedule; the peak rate is 1 where the rate is itself a schedule."""
    return lambda count: jnp.asarray(rate(count) if callable(rate) else 1.0, float)


def _printed(x: Any) -> float | str:
    """Returns a hyperparameter as the table shows it."""
    return float(x) if is_number(x) else "schedule" if callable(x) else "injected"


def _partition(optimizers: dict[str, Transform], names: Any) -> Transform:
    """Equals optax.partition, which takes a tree for a function if it is callable (Equinox)."""

    def init(params):
        return {name: o.init(select_group(names, name, params)) for name, o in optimizers.items()}

    def update(updates, state, params=None, **extra):
        new_state = {}
        for group, optimizer in optimizers.items():
            own_updates, own_params = (select_group(names, group, x) for x in (updates, params))
            own_updates, new_state[group] = optimizer.update(
                own_updates, state[group], own_params, **extra
            )
            put = lambda name, old, new, group=group: new if name == group else old
            updates = jax.tree.map(put, names, updates, own_updates)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def complete_optimizer(
    name: str,
    build_direction: Callable[[AxesTree], Transform],
    learning_rate: Rate,
    weight_decay: Hyperparameter,
    adam: AdamW,
    axes: Any = None,
    cautious_decay: bool = False,
    view: View = View(),  # noqa: B008
    stepper: Stepper | None = None,
    wrap: Callable[[Transform], Transform] = lambda optimizer: optimizer,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer that steps matrices along a direction, and everything else by AdamW.

    A recipe is a function whose arguments are all named, which is what optax.inject_hyperparams
    requires, and whose body is one call of this:

        return complete_optimizer(
            "soap", lambda axes: scale_by_soap(axes, b1, b2), learning_rate, weight_decay,
            AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay), axes,
        )

    Decay is decoupled: p <- p - learning_rate * (weight_decay * p + direction). Embeddings and
    heads decay too; embeddings of positions and vectors do not, nor do the matrices of an optimizer
    of WITHOUT_DECAY.
    `update(..., good=False)` returns updates of zero and leaves the state unchanged.

    Args:
        name: a key of OPTIMIZERS, or any other.
        build_direction: builds the transform from gradients to directions, before rate and decay.
            It gets a pytree of Axes, all matrices, with optax.MaskedNodes in the other leaves'
            places. It is also called with an empty tree, to check its arguments.
        learning_rate: of matrices; a number, an array or a function of the good steps.
        weight_decay: of matrices.
        adam: hyperparameters of AdamW.
        axes: see `resolve_axes`.
        cautious_decay: decays only entries that the step moves towards zero.
        view: what `describe` prints about the direction.
        stepper: builds the matrices' optimizer from their direction; None applies rate and decay.
        wrap: wraps the complete optimizer of the matrices, as gradient_transport does.

    Raises:
        ValueError: a rate or a decay is out of range, or a decay is a schedule.
    """
    check_rate(learning_rate, "learning_rate")
    check_number(weight_decay, "weight_decay")
    adam.check()

    def group_of(a: Axes) -> Group:
        rate = learning_rate if a.is_matrix else adam.learning_rate
        peak = 1.0 if callable(rate) else rate
        if a.is_matrix:
            decay = 0.0 if name in WITHOUT_DECAY else weight_decay
            return Group(MATRICES, name, view.geometry, peak, decay)
        decay = weight_decay if adam.weight_decay is None else adam.weight_decay
        decays = decay_group_of(a) in ("embedding", "head")
        return Group(REST, "adamw", "", peak, decay if decays else 0.0)

    def build(axes: AxesTree) -> Transform:
        groups = jax.tree.map(group_of, axes)
        names = jax.tree.map(lambda group: group.name, groups)
        select = lambda group, tree: select_group(names, group, tree)
        own_groups, own_axes = select(MATRICES, groups), select(MATRICES, axes)
        share = _share_of_peak(learning_rate)
        direction = optax.with_extra_args_support(build_direction(own_axes))
        if stepper is None:
            matrices = optax.chain(direction, scale_by_rate(own_groups, share, cautious_decay))
        else:
            matrices = stepper(direction, own_groups, own_axes, share)
        matrices = optax.with_extra_args_support(wrap(matrices))
        share = _share_of_peak(adam.learning_rate)
        rest = optax.chain(
            scale_by_adam(adam.b1, adam.b2, adam.eps),
            scale_by_rate(select(REST, groups), share, cautious_decay),
        )
        present, optimizers = set(jax.tree.leaves(names)), {MATRICES: matrices, REST: rest}
        return _partition({name: optimizers[name] for name in sorted(present)}, names)

    def row(name: str, a: Axes, shape: tuple[int, ...]) -> GroupRow:
        row = build_row(name, a, shape, group_of(a), view.scale, view.per_head)
        rate = learning_rate if a.is_matrix else adam.learning_rate
        return row._replace(rate=_printed(rate), decay=_printed(row.decay))

    optimizer = build_for_params(build, axes)

    def init(params):
        def rows():
            resolved = jax.tree.leaves(resolve_axes(axes, params))
            pairs = zip(named_params(params)[0], resolved, strict=True)
            return [row(name, a, x.shape) for (name, x), a in pairs]

        report_groups(rows)
        return optimizer.init(params)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(f"{name} needs params; got None. Call update(grads, state, params).")
        return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)

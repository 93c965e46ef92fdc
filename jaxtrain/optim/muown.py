"""Muown: Muon steps the directions of a matrix' rows, Adam their lengths.

A row is the weights of one output. It is w = length * v / |v|: the length is a separate variable,
and v is the row's direction, of which w and |v| are stored.

Source: Lion et al. 2026, https://arxiv.org/abs/2605.10797, as in modded-nanogpt, track 3,
results/20260508_muown, class MuownDP
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import AxesTree
from jaxtrain.optim import Hyperparameter, check_number, is_number, is_zero
from jaxtrain.optim.adam import scale_by_adam
from jaxtrain.optim.complete import AdamW, Rate, View, complete_optimizer
from jaxtrain.optim.muon import scale_by_muon
from jaxtrain.optim.newton_schulz import NewtonSchulz
from jaxtrain.optim.precision import widest
from jaxtrain.optim.rate_step import EPS, Schedule, rate_now

ZERO_ROW_LENGTH = 0.33**0.5  # length of a row that is zero at init; from the source
RADIUS_POWER = 1.2  # of the schedule of |v|; from the source


class MuownState(NamedTuple):
    count: jax.Array  # int32 [], steps with finite gradients
    direction: Any  # state of Muon
    adam: Any  # state of the lengths' Adam
    length: optax.Updates  # of rows: like params, with the dims of inputs reduced to 1
    radius: optax.Updates  # |v| at init, like length


def _row_norms(axes: Axes, x: jax.Array) -> jax.Array:
    return jnp.sqrt(_sum_rows(axes, x * x))


def _sum_rows(axes: Axes, x: jax.Array) -> jax.Array:
    """Sums over the inputs of each output; their dims become 1."""
    first = len(axes.stack) + (len(axes.outputs) if axes.outputs_first else 0)
    return jnp.sum(x, tuple(range(first, first + len(axes.inputs))), keepdims=True)


def step_by_muown(
    direction: optax.GradientTransformationExtraArgs,
    groups: Any,
    axes: AxesTree,
    schedule: Schedule,
    adam: optax.GradientTransformationExtraArgs,
    final_radius: Hyperparameter = 0.0,
    total_steps: Hyperparameter = 1,
) -> optax.GradientTransformationExtraArgs:
    """Steps length and direction of each row along their own gradients, at one rate.

    Both gradients follow from that of w by the chain rule. The step of v is rate * schedule(count)
    * direction. |v| is then set by a separate schedule: from the row's norm at init to
    final_radius at the end of the run; a larger |v| makes the same step turn the row less.

    `update` takes `good` and `rates` as that of `scale_by_rate` does. On a mesh, sums over split
    rows cost all-reduces of one number an output, three times a step.

    Args:
        direction: from the gradients of v to Muon's directions.
        groups: pytree of Group, like params.
        axes: pytree of Axes, like params, all matrices.
        adam: from the gradients of lengths to their directions.
        final_radius: |v| after total_steps; 0 keeps the row's norm at init.
    """

    def init(params):
        def length(a, p):
            norm = _row_norms(a, p.astype(widest(p)))
            return jnp.where(norm > 0, norm, ZERO_ROW_LENGTH)

        lengths = jax.tree.map(length, axes, params)
        # Another buffer than that of the lengths, as a step overwrites its state in place.
        radius = jax.tree.map(jnp.copy, lengths)
        count = jnp.zeros((), jnp.int32)
        return MuownState(count, direction.init(params), adam.init(lengths), lengths, radius)

    def update(updates, state, params=None, *, good: jax.Array | bool = True, rates=None, **extra):
        scale = schedule(state.count)
        progress = jnp.maximum(state.count - 1, 0).astype(float) / jnp.maximum(total_steps - 1, 1)
        share = jnp.minimum(progress, 1) ** RADIUS_POWER
        if is_zero(final_radius):
            share = jnp.zeros(())

        def unit(a, p, length):
            p = p.astype(widest(p, length))
            return jnp.where(length < 0, -1, 1) * p / jnp.maximum(_row_norms(a, p), EPS)

        units = jax.tree.map(unit, axes, params, state.length)
        radii = jax.tree.map(lambda r: r + share.astype(r.dtype) * (final_radius - r), state.radius)
        of_length = jax.tree.map(lambda a, g, u: _sum_rows(a, g * u), axes, updates, units)
        of_direction = jax.tree.map(
            lambda g, u, along, length, radius: length / radius * (g - u * along),
            *(updates, units, of_length, state.length, radii),
        )
        turns, muon_state = direction.update(
            of_direction, state.direction, params, good=good, **extra
        )
        moves, adam_state = adam.update(of_length, state.adam, state.length, good=good)

        def new_length(group, length, move):
            rate = rate_now(group, scale, rates).astype(length.dtype)
            return jnp.where(good, length - rate * move, length).astype(length.dtype)

        lengths = jax.tree.map(new_length, groups, state.length, moves)

        def step(group, a, u, turn, radius, length, param):
            v = radius * u - rate_now(group, scale, rates).astype(u.dtype) * turn.astype(u.dtype)
            new = length * v / jnp.maximum(_row_norms(a, v), EPS)
            return jnp.where(good, new - param.astype(u.dtype), 0).astype(param.dtype)

        steps = jax.tree.map(step, groups, axes, units, turns, radii, lengths, params)
        count = state.count + jnp.where(good, 1, 0)
        return steps, MuownState(count, muon_state, adam_state, lengths, state.radius)

    return optax.GradientTransformationExtraArgs(init, update)


def muown(
    axes: Any = None,
    learning_rate: Rate = 0.00325,
    weight_decay: Hyperparameter = 0.0,
    *,
    final_radius: Hyperparameter = 0.0,
    total_steps: Hyperparameter = 1,
    newton_schulz: str | NewtonSchulz = "jordan",
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    scale: str = "match_rms",
    dtype: DTypeLike = "bfloat16",
    buffer_dtype: DTypeLike | None = None,
    per_head: bool = False,
    cautious_decay: bool = False,
    adam_learning_rate: Rate = 3e-3,
    adam_b1: Hyperparameter = 0.9,
    adam_b2: Hyperparameter = 0.95,
    adam_eps: Hyperparameter = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Builds Muown for the matrices and AdamW for everything else, as in the trainer.

    Args:
        learning_rate: of directions and lengths; the default is the source's, for its scale.
        weight_decay: of embeddings and heads; matrices do not decay.
        final_radius, total_steps: see `step_by_muown`.
        adam_b1, adam_b2, adam_eps: also of the lengths. The other arguments are those of `muon`.

    Raises:
        ValueError: final_radius is set without total_steps, or a number is out of range.
    """
    check_number(final_radius, "final_radius")
    check_number(total_steps, "total_steps")
    if is_number(total_steps) and total_steps < 2 and not is_zero(final_radius):
        raise ValueError(
            f"total_steps must be the steps of the run with final_radius={final_radius}; got "
            f"{total_steps}. Set total_steps."
        )
    options = {"newton_schulz": newton_schulz, "momentum": momentum, "nesterov": nesterov}
    options |= {"scale": scale, "dtype": dtype, "buffer_dtype": buffer_dtype, "per_head": per_head}
    adam = scale_by_adam(adam_b1, adam_b2, adam_eps)
    return complete_optimizer(
        "muown",
        lambda axes: scale_by_muon(axes, **options),
        learning_rate,
        weight_decay,
        AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps),
        axes,
        cautious_decay,
        View("spectral", scale, per_head),
        lambda direction, groups, axes, schedule: step_by_muown(
            direction, groups, axes, schedule, adam, final_radius, total_steps
        ),
    )


def build_muown(
    cfg: OptimConfig, direction: Any, groups: Any, axes: AxesTree, schedule: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Builds Muown for the matrices of a config, given Muon's direction."""
    adam = scale_by_adam(cfg.adam_b1, cfg.adam_b2, cfg.adam_eps)
    return step_by_muown(direction, groups, axes, schedule, adam, cfg.final_radius, cfg.total_steps)

"""From a direction to a step: the last transform of each parameter group, with rate and decay."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.config.sections import OptimConfig
from jaxtrain.optim import is_zero
from jaxtrain.optim.param_groups import Group

Schedule = Callable[[jax.Array | int], jax.Array]  # updates made -> share of the peak rate


class RateState(NamedTuple):
    count: jax.Array  # int32 [], steps with finite gradients; every group's schedule reads it


def rate_now(group: Group, scale: jax.Array, rates: dict[str, jax.Array] | None) -> jax.Array:
    """Returns scale * the group's peak rate, which rates[group.name] replaces if given."""
    return (group.rate if rates is None else rates[group.name]) * scale


def scale_by_rate(
    groups: Any, schedule: Schedule, cautious: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Maps u to -rate * schedule(count) * (u + decay * p), with each leaf's group's rate and decay.

    `update(..., rates={group's name: peak})` replaces the groups' rates.

    Args:
        groups: pytree of Group, like params.
        cautious: decays only entries that the step moves towards zero, those with u * p > 0.
            Source: Chen et al. 2025, https://arxiv.org/abs/2510.12402; the inequality is strict
            as in modded-nanogpt, track 3, results/20260619_cwd_rowfloor_tailema.
    """

    def init(params):
        del params
        return RateState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, good: jax.Array | bool = True, rates=None, **extra):
        del extra
        scale = schedule(state.count)

        def step(group, u, p):
            if is_zero(group.decay):
                decayed = u
            else:
                # Compared by sign: the product of two small numbers could underflow to zero.
                decayed = jnp.where(jnp.sign(u) * jnp.sign(p) > 0, p, 0) if cautious else p
                decayed = u + group.decay * decayed
            rate = rate_now(group, scale, rates)
            return jnp.where(good, (-rate).astype(u.dtype) * decayed, 0)

        updates = jax.tree.map(step, groups, updates, params)
        return updates, RateState(state.count + jnp.where(good, 1, 0))

    return optax.GradientTransformationExtraArgs(init, update)


def build_rate_step(
    cfg: OptimConfig, groups: Any, schedule: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Builds the transform from the directions of a group's parameters to their steps."""
    return scale_by_rate(groups, schedule, cfg.cautious_decay)

"""From a direction to a step: the last transform of each parameter group, with rate and decay."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import AxesTree
from jaxtrain.optim import is_zero
from jaxtrain.optim.default_axes import named_params
from jaxtrain.optim.param_groups import NORM_PRESERVING, Group
from jaxtrain.optim.precision import widest

EPS = 1e-10  # floor of norms that are divided by, as in the source of `keep_norms`
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

    Steps have the parameter's type and are computed in the widest, float32 at least.
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

        def step(group, u, param):
            dtype = widest(u, param)
            u, p = u.astype(dtype), param.astype(dtype)
            if is_zero(group.decay):
                decayed = u
            else:
                # Compared by sign: the product of two small numbers could underflow to zero.
                decayed = jnp.where(jnp.sign(u) * jnp.sign(p) > 0, p, 0) if cautious else p
                decayed = u + group.decay * decayed
            rate = rate_now(group, scale, rates)
            return jnp.where(good, (-rate).astype(dtype) * decayed, 0).astype(param.dtype)

        updates = jax.tree.map(step, groups, updates, params)
        return updates, RateState(state.count + jnp.where(good, 1, 0))

    return optax.GradientTransformationExtraArgs(init, update)


class SphereState(NamedTuple):
    count: jax.Array  # int32 [], steps with finite gradients
    # Frobenius norms at init, like params, but with the dims of a matrix reduced to 1. Recomputed
    # from the parameters they would drift by rounding, and ema_lookahead steps from other points.
    norm: optax.Updates


def keep_norms(
    groups: Any, axes: AxesTree, schedule: Schedule, per_head: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Moves each matrix by a share of its Frobenius norm, then restores that norm.

    With R the norm at init, p becomes R v/|v|, where v = p - rate * schedule(count) * R u/|u|. If u
    is perpendicular to p, the rate is the tangent of the angle between old and new p. The length of
    u has no effect. Weight decay would change only this angle, so it is left out. `update` takes
    `good` and `rates` as that of `scale_by_rate` does.

    On a mesh XLA sums over split matrices in one to three all-reduces a step, of three numbers a
    matrix.

    Source: Wen et al. 2026 ("Hyperball"), as in modded-nanogpt, track 3, results/20260430_muonh;
    Ren et al. 2026, https://arxiv.org/abs/2603.28743

    Args:
        groups: pytree of Group, like params.
        axes: pytree of Axes, like params, all matrices.
        per_head: the slice of each head is a separate matrix.

    Raises:
        ValueError: at init, outside of jit, a matrix is zero. It would never move.
    """
    view = Axes.head_axes if per_head else lambda a: a
    merge = lambda a, x: a.merge_heads(x) if per_head else x

    def split(a, x):
        x = x.astype(widest(x))  # sums need more bits than bfloat16
        return a.split_heads(x)[1] if per_head else x

    def inner(a, x, y):
        """Sums x * y over each matrix; the dims of a matrix become 1."""
        return jnp.sum(x * y, tuple(range(len(view(a).stack), x.ndim)), keepdims=True)

    def init(params):
        def norm_of(a, p):
            p = split(a, p.astype(widest(p)))
            return jnp.sqrt(inner(a, p, p))

        norm = jax.tree.map(norm_of, axes, params)
        for name, x in named_params(norm)[0]:
            if not isinstance(x, Tracer) and not jnp.all(x):
                raise ValueError(
                    "muon_h and adam_h need matrices that are not zero, whose norm they keep; got "
                    f"a zero matrix in {name}. Initialise it otherwise (--model.init_std), or use "
                    "another optimizer (--optim.name)."
                )
        return SphereState(jnp.zeros((), jnp.int32), norm)

    def update(updates, state, params=None, *, good: jax.Array | bool = True, rates=None, **extra):
        del extra
        scale = schedule(state.count)

        def step(group, a, direction, param, norm):
            dtype = widest(direction, param)
            u, p = split(a, direction.astype(dtype)), split(a, param.astype(dtype))
            length = jnp.asarray(rate_now(group, scale, rates), norm.dtype) * norm
            factor = length / jnp.maximum(jnp.sqrt(inner(a, u, u)), EPS)
            # |v|^2 from three sums that do not wait for each other
            square = inner(a, p, p) - 2 * factor * inner(a, p, u) + factor**2 * inner(a, u, u)
            shrink = norm / jnp.maximum(jnp.sqrt(jnp.maximum(square, 0)), EPS)
            move = merge(a, (shrink - 1) * p - shrink * factor * u)
            return jnp.where(good, move, 0).astype(param.dtype)

        updates = jax.tree.map(step, groups, axes, updates, params, state.norm)
        return updates, SphereState(state.count + jnp.where(good, 1, 0), state.norm)

    return optax.GradientTransformationExtraArgs(init, update)


def build_rate_step(
    cfg: OptimConfig, groups: Any, axes: AxesTree, schedule: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Builds the transform from the directions of one group's parameters to their steps."""
    if all(group.optimizer in NORM_PRESERVING for group in jax.tree.leaves(groups)):
        return keep_norms(groups, axes, schedule, cfg.per_head)
    return scale_by_rate(groups, schedule, cfg.cautious_decay)

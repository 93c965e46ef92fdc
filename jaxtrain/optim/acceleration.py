"""Acceleration around any optimizer: gradients are taken ahead of the iterate.

The parameters of a run are then the query point; the iterate, which is what is evaluated, sampled
and exported, is `eval_params(opt_state, params)`. At strength 0 both wrappers are the inner
optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TransportState(NamedTuple):
    count: jax.Array  # int32 [], good steps
    inner: Any
    offset: optax.Updates  # query point minus iterate, like params

    def ahead(self):
        return self.offset


class LookaheadState(NamedTuple):
    count: jax.Array  # int32 [], good steps
    inner: Any
    displacement: optax.Updates  # averaged step of the iterate, like params
    reach: jax.Array  # float32 [], displacements by which the query point is ahead

    def ahead(self):
        return jax.tree.map(lambda d: self.reach.astype(d.dtype) * d, self.displacement)


WRAPPERS = TransportState, LookaheadState


def _schedule(strength):
    return strength if callable(strength) else lambda count: jnp.asarray(strength, jnp.float32)


def _minus(params, offset):
    """params - offset, leaf by leaf; leaves that the wrapper does not see stay."""
    unseen = lambda x: isinstance(x, optax.MaskedNode)
    take = lambda o, p: p if unseen(o) else p - o.astype(p.dtype)
    return jax.tree.map(take, offset, params, is_leaf=unseen)


def transported(
    inner, momentum, strength, buffer_dtype=None
) -> optax.GradientTransformationExtraArgs:
    """Implicit gradient transport: the next gradient is taken where momentum says it is wanted.

    The query point is ahead of the iterate by strength * momentum / (1 - momentum) of the last
    step; strength 1 is the theory's. One gradient a step, one buffer.

    Source: Cutkosky & Mehta 2020, https://arxiv.org/abs/2002.03305; for arbitrary norms
    https://arxiv.org/abs/2106.14343.

    Args:
        inner: a whole optimizer, rate and decay included; its params are the iterate.
        momentum: of the inner average, in [0, 1).
        strength: in [0, 1], or a schedule of the good steps made.
        buffer_dtype: of the buffer; None is the parameter's.

    Raises:
        ValueError: momentum is outside [0, 1), or strength is negative.
    """
    _check(momentum, strength, "optim.momentum")
    strength, inner = _schedule(strength), optax.with_extra_args_support(inner)

    def init(params):
        offset = optax.tree.zeros_like(params, dtype=buffer_dtype)
        return TransportState(jnp.zeros((), jnp.int32), inner.init(params), offset)

    def update(grads, state, params=None, *, good=True, **extra):
        iterate = _minus(params, state.offset)
        steps, state_inner = inner.update(grads, state.inner, iterate, good=good, **extra)
        steps = jax.tree.map(lambda u: jnp.where(good, u, 0), steps)
        reach = strength(state.count) * (momentum / (1 - momentum))
        reached = lambda u, old: jnp.where(good, (reach.astype(u.dtype) * u).astype(old.dtype), old)
        offset = jax.tree.map(reached, steps, state.offset)
        shift = lambda u, new, old: u + (new.astype(u.dtype) - old.astype(u.dtype))
        updates = jax.tree.map(shift, steps, offset, state.offset)
        count = state.count + jnp.where(good, 1, 0)
        return updates, TransportState(count, state_inner, offset)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_lookahead(
    inner, strength, decay=0.99, buffer_dtype=None
) -> optax.GradientTransformationExtraArgs:
    """Nesterov's look-ahead along an average of the iterate's steps.

    Slow drift is multiplied by up to 1 / (1 - strength), noise is not: it belongs between warm-up
    and the rate's decay, which a schedule of strength says.

    Source: Yau et al. 2026, https://arxiv.org/abs/2605.25395

    Args:
        inner: a whole optimizer, rate and decay included; it steps from the query point.
        strength: in [0, 1), or a schedule of the good steps made.
        decay: of the averaged step, in [0, 1).
        buffer_dtype: of the average; None is the parameter's.

    Raises:
        ValueError: decay or strength is outside [0, 1).
    """
    _check(decay, strength, "optim.lookahead_decay")
    if not callable(strength) and strength >= 1:
        raise ValueError(
            f"optim.strength must be below 1 to look ahead; got {strength}. Set --optim.strength."
        )
    strength, inner = _schedule(strength), optax.with_extra_args_support(inner)

    def init(params):
        zeros = optax.tree.zeros_like(params, dtype=buffer_dtype)
        count, reach = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return LookaheadState(count, inner.init(params), zeros, reach)

    def update(grads, state, params=None, *, good=True, **extra):
        steps, state_inner = inner.update(grads, state.inner, params, good=good, **extra)
        steps = jax.tree.map(lambda u: jnp.where(good, u, 0), steps)
        count = state.count + jnp.where(good, 1, 0)
        reach = jnp.where(good, strength(count), state.reach).astype(jnp.float32)

        def averaged(u, mean):
            moved = u + state.reach.astype(u.dtype) * mean.astype(u.dtype)
            kept = decay * mean.astype(u.dtype) + (1 - decay) * moved
            return jnp.where(good, kept.astype(mean.dtype), mean)

        mean = jax.tree.map(averaged, steps, state.displacement)
        ahead = lambda u, d: jnp.where(good, u + reach.astype(u.dtype) * d.astype(u.dtype), u)
        updates = jax.tree.map(ahead, steps, mean)
        return updates, LookaheadState(count, state_inner, mean, reach)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(decay, strength, flag):
    if not 0 <= decay < 1:
        raise ValueError(f"{flag} must be in [0, 1); got {decay}. Set --{flag}.")
    if not callable(strength) and not strength >= 0:
        raise ValueError(f"optim.strength must be 0 or more; got {strength}. Set --optim.strength.")


def describe_evaluated_weights(opt_state) -> str:
    """Names the weights that eval_params returns."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, WRAPPERS))
    ahead = any(isinstance(node, WRAPPERS) for node in nodes)
    return "the iterate, not the look-ahead point" if ahead else "the parameters"


def eval_params(opt_state, params):
    """The weights to evaluate, export and sample with: the iterate, where a wrapper is ahead of it.

    Args:
        opt_state: any optax state; wrappers are found wherever they stand in it.
        params: the run's parameters, where gradients are taken.
    """
    wrapped = lambda x: isinstance(x, WRAPPERS)
    for node in jax.tree.leaves(opt_state, is_leaf=wrapped):
        if wrapped(node):
            params = eval_params(node.inner, _minus(params, node.ahead()))
    return params

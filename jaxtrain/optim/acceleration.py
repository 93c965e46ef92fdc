"""Wrappers that accelerate any optimizer by taking gradients ahead of its iterate.

There are then two sets of weights. The run's parameters are the query point, where gradients are
taken. The iterate is what the optimizer has reached: evaluation, sampling and export use it,
through `eval_params(opt_state, params)`. A wrapper stores only the difference of the two, so it
must be the last transform that changes updates. A good step is one with finite gradients.

At strength 0 the two coincide. Given the number 0, a wrapper returns the inner optimizer itself:
compiled steps are then bitwise equal, and no buffer is stored. Given a schedule that returns 0,
they differ by rounding. The inner optimizer's step alone compiles to a fused multiply-add,
parameter minus rate times direction, rounded once; the wrapper adds the offset's change in between.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxtrain.model.trees import ArrayTree
from jaxtrain.optim import Hyperparameter, check_decay, how_to_set, is_number, is_zero
from jaxtrain.optim.default_axes import is_variable
from jaxtrain.optim.precision import average, widest, zero_buffers

PARAMETERS, ITERATE = "the parameters", "the iterate, not the look-ahead point"
STATE_FIELDS = [  # of the wrappers' states here and in tail_average.py
    {"count", "inner", *own}
    for own in (["offset"], ["displacement", "reach"], ["average", "share"])
]
# A number, an array, or a function of the good steps.
Strength = Hyperparameter | Callable[[jax.Array], jax.Array]


class TransportState(NamedTuple):
    count: jax.Array  # int32 [], good steps
    inner: Any
    offset: optax.Updates  # query point minus iterate, like params

    def evaluated(self, params: ArrayTree) -> ArrayTree:
        """Returns what eval_params does, given the query point."""
        return eval_params(self.inner, _subtract(params, self.offset))

    def describe(self, inner: str) -> str:
        """Describes the evaluated weights."""
        return inner.replace(PARAMETERS, ITERATE)

    def settled(self) -> "TransportState":
        """Returns the state whose query point is its iterate."""
        zeros = jax.tree.map(jnp.zeros_like, self.offset)
        return self._replace(inner=settle(self.inner), offset=zeros)


class LookaheadState(NamedTuple):
    count: jax.Array  # int32 [], good steps
    inner: Any
    displacement: optax.Updates  # averaged step of the iterate, like params
    reach: jax.Array  # [], the widest type of all params; the offset is reach * displacement

    def evaluated(self, params: ArrayTree) -> ArrayTree:
        """Returns what eval_params does, given the query point."""
        offset = jax.tree.map(lambda d: self.reach * d, self.displacement)
        return eval_params(self.inner, _subtract(params, offset))

    def describe(self, inner: str) -> str:
        """Describes the evaluated weights."""
        return inner.replace(PARAMETERS, ITERATE)

    def settled(self) -> "LookaheadState":
        """Returns the state whose query point is its iterate."""
        zeros = jax.tree.map(jnp.zeros_like, self.displacement)
        return self._replace(inner=settle(self.inner), displacement=zeros)


def _is_wrapper(node):
    """Whether a node of an optimizer's state chooses which weights are evaluated."""
    return hasattr(node, "evaluated")


def _is_wrapper_without_type(node):
    """Whether a node is a wrapper's state that became a dict of its fields."""
    return isinstance(node, Mapping) and set(node) in STATE_FIELDS


def _has_wrapper(tree):
    return any(map(_is_wrapper, jax.tree.leaves(tree, is_leaf=_is_wrapper)))


def _is_chain_past_wrapper(node):
    """Whether a node is the state of a chain in which transforms follow a wrapper."""
    return type(node) is tuple and _has_wrapper(node[:-1])


def _find_wrappers(opt_state):
    """Returns the outermost wrappers' states; raises ValueError as eval_params does."""
    stop = lambda x: _is_wrapper(x) or _is_wrapper_without_type(x) or _is_chain_past_wrapper(x)
    nodes = jax.tree.leaves(opt_state, is_leaf=stop)
    if any(map(_is_wrapper_without_type, nodes)):
        raise ValueError(
            "opt_state must have its types; got dicts or lists in place of an optimizer's states. "
            "Restore it with a typed template, such as jax.eval_shape(optimizer.init, params)."
        )
    if any(map(_is_chain_past_wrapper, nodes)):
        raise ValueError(
            "accelerated_lmo or tail_average must be the last transform of optax.chain, as its "
            "iterate does not follow what others do to its updates; got others after it. Put it "
            "last, and change its rate by learning_rate=schedule or optax.inject_hyperparams. If "
            "the others change no updates, pass its own part of the state."
        )
    return [node for node in nodes if _is_wrapper(node)]


def _as_schedule(strength):
    at = strength if callable(strength) else lambda count: strength
    return lambda count: jnp.asarray(at(count), float)


def _subtract(params, offset):
    """Computes params - offset; leaves that the wrapper does not step are unchanged."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)

    def difference(o, p):
        return p if is_masked(o) else (p.astype(widest(o, p)) - o).astype(p.dtype)

    return jax.tree.map(difference, offset, params, is_leaf=is_masked)


def gradient_transport(
    inner: optax.GradientTransformation,
    momentum: Hyperparameter,
    strength: Strength,
    buffer_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes gradients ahead of the iterate, to make up for the age of those in the momentum.

    Momentum averages gradients of earlier iterates, which are momentum / (1 - momentum) steps old
    on average. A gradient taken that many steps ahead of the iterate cancels the lag to first
    order. The query point is ahead by the last step times strength * momentum / (1 - momentum);
    the theory has strength 1. The cost is one buffer; a step still takes one gradient.

    Source: Cutkosky & Mehta 2020, https://arxiv.org/abs/2002.03305; for arbitrary norms
    https://arxiv.org/abs/2106.14343.

    Args:
        inner: a complete optimizer, rate and decay included; its params are the iterate.
        momentum: decay of the inner optimizer's average, in [0, 1).
        strength: in [0, 1]; the number 0 returns inner.
        buffer_dtype: type of the buffer; None means the parameter's, float32 at least.

    Raises:
        ValueError: momentum is outside [0, 1), or strength outside [0, 1].
    """
    check_decay(momentum, "momentum", "optim.momentum")
    _check_strength(strength, reaches_one=True)
    inner = optax.with_extra_args_support(inner)
    if is_zero(strength):
        return inner
    schedule = _as_schedule(strength)

    def init(params):
        offset = zero_buffers(params, buffer_dtype)
        return TransportState(jnp.zeros((), jnp.int32), inner.init(params), offset)

    def update(updates, state, params=None, *, good: jax.Array | bool = True, **extra):
        iterate = _subtract(params, state.offset)
        steps, inner_state = inner.update(updates, state.inner, iterate, good=good, **extra)
        steps = jax.tree.map(lambda u: jnp.where(good, u, 0), steps)
        reach = schedule(state.count) * (momentum / (1 - momentum))
        types = jax.tree.map(widest, steps, state.offset, iterate)
        new_offset = lambda u, old, dtype: jnp.where(
            good, (reach.astype(dtype) * u.astype(dtype)).astype(old.dtype), old
        )
        offset = jax.tree.map(new_offset, steps, state.offset, types)

        def move(u, new, old, p, dtype):
            # The query point moves by the iterate's step and by the change of its offset.
            moved = u.astype(dtype) + (new.astype(dtype) - old.astype(dtype))
            return moved.astype(p.dtype)

        moves = jax.tree.map(move, steps, offset, state.offset, iterate, types)
        count = state.count + jnp.where(good, 1, 0)
        return moves, TransportState(count, inner_state, offset)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_lookahead(
    inner: optax.GradientTransformation,
    strength: Strength,
    decay: Hyperparameter = 0.99,
    buffer_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies Nesterov's look-ahead along an exponential average of the iterate's steps.

    Slow drift is amplified by up to 1 / (1 - strength), noise is not. This helps only between
    warm-up and the decay of the rate: pass a schedule that is zero elsewhere.

    Source: Yau et al. 2026, https://arxiv.org/abs/2605.25395

    Args:
        inner: a complete optimizer, rate and decay included; it steps from the query point.
        strength: in [0, 1); the number 0 returns inner.
        decay: decay of the averaged step, in [0, 1).
        buffer_dtype: type of the average; None means the parameter's, float32 at least.

    Raises:
        ValueError: decay or strength is outside [0, 1).
    """
    check_decay(decay, "decay", "optim.lookahead_decay")
    _check_strength(strength, reaches_one=False)
    inner = optax.with_extra_args_support(inner)
    if is_zero(strength):
        return inner
    schedule = _as_schedule(strength)

    def init(params):
        zeros = zero_buffers(params, buffer_dtype)
        count, reach = jnp.zeros((), jnp.int32), jnp.zeros((), widest(*jax.tree.leaves(params)))
        return LookaheadState(count, inner.init(params), zeros, reach)

    def update(updates, state, params=None, *, good: jax.Array | bool = True, **extra):
        steps, inner_state = inner.update(updates, state.inner, params, good=good, **extra)
        steps = jax.tree.map(lambda u: jnp.where(good, u, 0), steps)
        count = state.count + jnp.where(good, 1, 0)
        reach = jnp.where(good, schedule(count), state.reach).astype(state.reach.dtype)
        params = steps if params is None else params
        types = jax.tree.map(widest, steps, state.displacement, params)
        ahead = lambda u, reach, d, dtype: u.astype(dtype) + reach.astype(dtype) * d.astype(dtype)

        def averaged(u, mean, dtype):
            # The new iterate is the old query point plus the step, so it moved by offset and step.
            new = average(decay, mean, ahead(u, state.reach, mean, dtype), dtype)
            return jnp.where(good, new.astype(mean.dtype), mean)

        mean = jax.tree.map(averaged, steps, state.displacement, types)
        move = lambda u, d, p, dtype: jnp.where(good, ahead(u, reach, d, dtype), u).astype(p.dtype)
        moves = jax.tree.map(move, steps, mean, params, types)
        return moves, LookaheadState(count, inner_state, mean, reach)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_strength(strength, reaches_one):
    is_known = is_number(strength) or not (callable(strength) or hasattr(strength, "dtype"))
    in_range = is_number(strength) and (0 <= strength < 1 or (strength == 1 and reaches_one))
    if is_known and not in_range:
        valid = "in [0, 1]" if reaches_one else "in [0, 1)"
        hint = how_to_set("strength", "optim.strength")
        raise ValueError(f"strength must be {valid}; got {strength!r}. {hint}")


def describe_evaluated_weights(opt_state: optax.OptState) -> str:
    """Describes the weights that eval_params returns."""
    text = PARAMETERS
    for node in _find_wrappers(opt_state):
        text = node.describe(describe_evaluated_weights(node.inner))
    return text


def eval_params(opt_state: optax.OptState, params: ArrayTree) -> ArrayTree:
    """Returns the weights to evaluate, export and sample with: the iterate, or an average of it.

    Args:
        opt_state: any optax state; wrappers are found at any depth, and without one params are
            returned. A wrapper's state has a method `evaluated(params)`.
        params: the run's parameters, where gradients are taken.

    The iterate of an nnx.State has arrays in place of Variables; nnx.update and nnx.merge take it.

    Raises:
        ValueError: opt_state has dicts or lists in place of a wrapper's state, as after a restore
            without a template; transforms follow a wrapper in a chain; or the arguments are
            exchanged.
    """
    arrays = lambda tree: jax.tree.map(
        lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable
    )
    if _has_wrapper(params):
        raise ValueError(
            "params must be parameters; got an optimizer's state. Call "
            "eval_params(opt_state, params)."
        )
    for node in _find_wrappers(opt_state):
        params = arrays(node).evaluated(arrays(params))
    return params


def settle(opt_state: optax.OptState) -> optax.OptState:
    """Returns the state in which the parameters are the weights that eval_params returns."""
    settled = lambda node: node.settled() if _is_wrapper(node) else node
    return jax.tree.map(settled, opt_state, is_leaf=_is_wrapper)

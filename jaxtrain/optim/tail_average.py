"""Evaluates an average of the weights over the last part of a run instead of the last weights.

Training does not change: gradients are taken at the same points as without the average.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.model.trees import ArrayTree
from jaxtrain.optim import how_to_set
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.optim.precision import zero_buffers


class TailState(NamedTuple):
    count: jax.Array  # int32 [], steps with finite gradients
    inner: Any
    average: optax.Updates  # like params, float32 at least
    share: jax.Array  # [], share of the average in the evaluated weights; 0 before the tail

    def evaluated(self, params: ArrayTree) -> ArrayTree:
        """Returns share * average + (1 - share) * the inner optimizer's evaluated weights."""
        is_masked = lambda x: isinstance(x, optax.MaskedNode)  # a leaf of another optimizer

        def mix(a, p):
            mixed = p if is_masked(a) else jnp.where(self.share > 0, p + self.share * (a - p), p)
            return mixed.astype(p.dtype)

        latest = eval_params(self.inner, params)
        return jax.tree.map(mix, self.average, latest, is_leaf=is_masked)

    def describe(self, inner: str) -> str:
        """Describes the evaluated weights, given a description of the inner optimizer's."""
        share = float(self.share)
        if not share:
            return inner
        mean = "an average over the end of the run"
        return mean if share == 1 else f"{share:g} * {mean} + {1 - share:g} * {inner}"


def tail_average(
    inner: optax.GradientTransformation, start: int, horizon: float = 150.0, weight: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights from step `start` on, for `eval_params(opt_state, params)` to return.

    The average is w after step `start`; each later step adds (w - average) / horizon. With an
    accelerated inner optimizer w is its iterate, not the look-ahead point. The evaluated weights
    are (1 - weight) * w + weight * average; before step `start` they are w.

    Source: modded-nanogpt, track 3, results/20260611_tailema_2720_submission, which has horizon 150
    and weight 0.6

    As with an accelerated optimizer, no later transform of a chain may change updates.

    Args:
        inner: a complete optimizer, rate and decay included.
        start: step after which the average starts, 1 or later.
        horizon: in steps, 1 or more. The average is that many steps old, less one.
        weight: of the average, in [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    for argument, value, is_valid, valid, flag in [
        ("start", start, start >= 1, "1 or more", "tail_average"),
        ("horizon", horizon, horizon >= 1, "1 or more", "tail_horizon"),
        ("weight", weight, 0 <= weight <= 1, "in [0, 1]", "tail_weight"),
    ]:
        if not is_valid:
            hint = how_to_set(argument, f"optim.{flag}")
            raise ValueError(f"{argument} must be {valid}; got {value}. {hint}")
    inner = optax.with_extra_args_support(inner)

    def init(params):
        count, share = jnp.zeros((), jnp.int32), jnp.zeros((), float)
        return TailState(count, inner.init(params), zero_buffers(params), share)

    def update(updates, state, params=None, *, good: jax.Array | bool = True, **extra):
        if params is None:
            raise ValueError("tail_average needs the parameters; got None. Pass them to update.")
        steps, inner_state = inner.update(updates, state.inner, params, good=good, **extra)
        weights = eval_params(inner_state, optax.apply_updates(params, steps))
        count = state.count + jnp.where(good, 1, 0)

        def averaged(a, w):
            w = w.astype(a.dtype)
            return jnp.where(good, jnp.where(count > start, a + (w - a) / horizon, w), a)

        average = jax.tree.map(averaged, state.average, weights)
        share = jnp.where(count >= start, weight, 0).astype(state.share.dtype)
        return steps, TailState(count, inner_state, average, share)

    return optax.GradientTransformationExtraArgs(init, update)

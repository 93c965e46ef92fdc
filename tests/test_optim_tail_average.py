"""The average of the run's tail equals a twin in NumPy, and training does not depend on it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_twins import AXES, OPTIONS, SHAPES, draw, gradient, train_ours, train_twin

from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.acceleration import describe_evaluated_weights, eval_params
from jaxtrain.optim.build import build_optimizer
from jaxtrain.optim.tail_average import tail_average

TAIL = {"tail_average": 0.6, "tail_horizon": 7, "tail_weight": 0.4}
START = 20  # of 50 steps
ACCELERATED = {"name": "accelerated_lmo", "accelerate_all": True}
LOOKAHEAD = ACCELERATED | {"acceleration": "ema_lookahead", "strength": 0.6}


def averaged(history):
    """Returns the weights to evaluate after each step, as 20260611_tailema_2720 computes them."""
    ema, evaluated = {}, []
    for step, params in enumerate(history, start=1):
        weights = {name: np.asarray(x) for name, x in params.items()}
        if step <= START:
            ema = dict(weights)
        else:
            ema = {name: e + (weights[name] - e) / 7 for name, e in ema.items()}
        share = 0.4 if step >= START else 0.0
        evaluated.append({n: (1 - share) * w + share * ema[n] for n, w in weights.items()})
    return evaluated


def assert_equal_trees(ours, theirs, tolerance):
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, ACCELERATED, LOOKAHEAD], ids=["muon", "transport", "ema"])
def test_evaluated_weights_average_the_iterate_over_the_tail_and_training_is_the_same(options):
    plain, _ = train_ours(**options)
    ours, state = train_ours(**options, **TAIL)
    expected = averaged([iterate for _, iterate in plain] if options else train_twin())
    for step, (params, evaluated) in enumerate(ours):
        assert_equal_trees(params, plain[step][0], 1e-12)
        assert_equal_trees(evaluated, expected[step], 1e-10)
    iterate = "the iterate, not the look-ahead point" if options else "the parameters"
    text = describe_evaluated_weights(state)
    assert text == f"0.4 * an average over the end of the run + 0.6 * {iterate}"


def test_before_the_tail_the_last_weights_are_evaluated_and_described():
    optimizer = build_optimizer(OptimConfig(**OPTIONS | TAIL), AXES)
    params = {name: jnp.asarray(x) for name, x in draw(0).items()}
    state = optimizer.init(params)
    for step in range(2):
        updates, state = optimizer.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    assert describe_evaluated_weights(state) == "the parameters"
    jax.tree.map(np.testing.assert_array_equal, eval_params(state, params), params)


def test_a_bad_step_leaves_the_average_unchanged():
    params = {"w": jnp.ones(3)}
    optimizer = tail_average(optax.sgd(0.1), start=1, horizon=2)
    grads, state = {"w": jnp.arange(3.0)}, optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    _, after = optimizer.update({"w": jnp.full(3, jnp.nan)}, state, params, good=False)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_the_average_costs_one_float32_buffer_and_only_when_it_is_on():
    params = {name: jnp.zeros(shape, jnp.float32) for name, shape in SHAPES.items()}
    size = lambda **options: sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(
            jax.eval_shape(build_optimizer(OptimConfig(**options), AXES).init, params)
        )
        if x.ndim
    )
    entries = sum(x.size for x in params.values())
    assert size(tail_average=0.1, narrow_buffers=True) == size(narrow_buffers=True) + 4 * entries


def test_an_average_of_bfloat16_weights_does_not_stall():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    optimizer = tail_average(optax.sgd(1.0), start=1, horizon=1000)
    state: Any = optimizer.init(params)
    for gradient_ in [0.0] + [-1.0] * 40:
        updates, state = optimizer.update(
            {"w": jnp.full(4, gradient_, jnp.bfloat16)}, state, params
        )
        params = optax.apply_updates(params, updates)
    expected = 1.0
    for step in range(1, 41):
        expected += (1 + step - expected) / 1000
    np.testing.assert_allclose(np.asarray(state.average["w"]), expected, rtol=1e-5)


def test_the_average_works_for_a_part_of_the_parameters():
    averaging = tail_average(optax.sgd(1.0), start=1, horizon=4)
    optimizer = optax.partition({"a": averaging, "b": optax.sgd(1.0)}, {"x": "a", "y": "b"})
    params = {"x": jnp.zeros(2), "y": jnp.zeros(2)}
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    evaluated = eval_params(state, params)
    assert evaluated["x"][0] == -1.25 and evaluated["y"][0] == -2


@pytest.mark.parametrize(
    "arguments, flag",
    [((0,), "tail_average"), ((1, 0.5), "tail_horizon"), ((1, 2, 1.5), "tail_weight")],
)
def test_an_argument_out_of_range_names_its_flag(arguments, flag):
    with pytest.raises(ValueError, match=f"--optim.{flag}"):
        tail_average(optax.sgd(0.1), *arguments)

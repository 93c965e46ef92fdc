"""Acceleration of a config's optimizers: which weights move, and which are evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_optim_build import FEW, random_params

from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.acceleration import describe_evaluated_weights, eval_params
from jaxtrain.optim.build import OPTIMIZERS, build_optimizer


@pytest.mark.parametrize("name", ["muon", "normuon", "adamw"])
def test_without_acceleration_the_parameters_are_evaluated(name):
    params = random_params(0)
    state = build_optimizer(OptimConfig(name=name), FEW).init(params)
    assert eval_params(state, params) is params
    assert describe_evaluated_weights(state) == "the parameters"


@pytest.mark.parametrize("acceleration", ["transport", "ema_lookahead"])
@pytest.mark.parametrize("all_groups", [False, True])
def test_acceleration_moves_the_query_point_of_the_accelerated_groups_only(
    acceleration, all_groups
):
    options = {"acceleration": acceleration, "accelerate_all": all_groups, "total_steps": 4}
    cfg = OptimConfig(name="accelerated_lmo", warmup_steps=0, schedule="constant", **options)
    optimizer, params = build_optimizer(cfg, FEW), random_params(0)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i in range(2):
        updates, state = update(random_params(i), state, params)
        params = optax.apply_updates(params, updates)
    iterate = eval_params(state, params)
    assert describe_evaluated_weights(state) == "the iterate, not the look-ahead point"
    moved = {key for key in FEW if not jnp.array_equal(iterate[key], params[key])}
    assert moved == (set(FEW) if all_groups else {"w_in", "w_out"})


def steps_on_fixed_gradients(name, **options):
    """Returns the query point and the iterate after 4 steps whose gradients ignore the weights."""
    options |= {"warmup_steps": 1, "total_steps": 8, "ns_dtype": "float32"}
    cfg = OptimConfig(name=name, weight_decay=0.1, **options)
    optimizer, params = build_optimizer(cfg, FEW), random_params(0)
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for i in range(4):
        updates, state = update(random_params(i + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, eval_params(state, params)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "accelerated_lmo"])
def test_every_optimizer_can_be_accelerated(name):
    """Transport is exact: on equal gradients the iterate is where the plain optimizer would be."""
    plain, _ = steps_on_fixed_gradients(name, nesterov=False)
    query, iterate = steps_on_fixed_gradients(name, accelerated=True, accelerate_all=True)
    for key in FEW:
        np.testing.assert_allclose(iterate[key], plain[key], rtol=2e-5, atol=2e-6)
        assert not np.allclose(query[key], plain[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["soap", "adamw"])  # of accelerated_lmo there are other tests
def test_lookahead_moves_the_query_point_of_optimizers_without_geometry(name):
    query, iterate = steps_on_fixed_gradients(name, accelerated=True, acceleration="ema_lookahead")
    assert not jnp.array_equal(query["w_in"], iterate["w_in"])


def test_accelerated_muon_is_accelerated_lmo():
    for ours, theirs in zip(
        jax.tree.leaves(steps_on_fixed_gradients("muon", accelerated=True)),
        jax.tree.leaves(steps_on_fixed_gradients("accelerated_lmo")),
        strict=True,
    ):
        assert jnp.array_equal(ours, theirs)

"""Errors of eval_params where the iterate would silently be wrong."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, serialization

from jaxtrain.optim import acceleration
from jaxtrain.optim.recipes import accelerated_lmo, eval_params, muon, tail_average
from jaxtrain.optim.tail_average import TailState

PARAMS = {"w": jnp.ones((3, 4)), "bias": jnp.ones(4)}
STATES = acceleration.TransportState, acceleration.LookaheadState, TailState
CLIP = optax.clip_by_global_norm(1.0)
WRAPPED = {
    "accelerated_lmo": accelerated_lmo(),
    "chain": optax.chain(CLIP, accelerated_lmo()),
    "tail_average": tail_average(muon(), 1),
    "both": tail_average(optax.chain(CLIP, accelerated_lmo()), 1),
}


def as_lists_and_dicts(state):
    """Returns what Orbax restores without a template."""
    if hasattr(state, "_asdict"):
        state = state._asdict()
    if isinstance(state, dict):
        return {name: as_lists_and_dicts(x) for name, x in state.items()}
    return [as_lists_and_dicts(x) for x in state] if isinstance(state, tuple) else state


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("lose_types", [as_lists_and_dicts, serialization.to_state_dict])
def test_a_state_that_lost_its_types_is_refused(name, lose_types):
    state = lose_types(WRAPPED[name].init(PARAMS))
    with pytest.raises(ValueError, match="opt_state must have its types; .* typed template"):
        eval_params(state, PARAMS)


def test_the_fields_of_every_wrapper_are_known_and_those_of_parameters_are_not():
    assert [set(state._fields) for state in STATES] == acceleration.STATE_FIELDS
    params = {"count": jnp.ones(3), "inner": jnp.ones((2, 3))}
    eval_params(optax.adam(0.1).init(params), params)


def test_the_state_of_an_nnx_optimizer_is_read_and_its_nnx_state_is_refused():
    net = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, WRAPPED["chain"], wrt=nnx.Param)
    eval_params(optimizer.opt_state, nnx.state(net, nnx.Param))
    with pytest.raises(ValueError, match="opt_state must have its types"):
        eval_params(nnx.state(optimizer), nnx.state(net, nnx.Param))


def test_a_state_without_a_wrapper_may_have_lost_its_types():
    for optimizer in (muon(), optax.chain(CLIP, muon(), optax.scale(0.5))):
        state = optimizer.init(PARAMS)
        assert eval_params(state, PARAMS) is PARAMS
        assert eval_params(as_lists_and_dicts(state), PARAMS) is PARAMS


@pytest.mark.parametrize("name", WRAPPED)
def test_exchanged_arguments_are_refused(name):
    with pytest.raises(ValueError, match=r"Call eval_params\(opt_state, params\)"):
        eval_params(PARAMS, WRAPPED[name].init(PARAMS))


LATER = {
    "scale": optax.scale(0.5),
    "plateau": optax.contrib.reduce_on_plateau(),
    "projection": optax.keep_params_nonnegative(),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("later", LATER)
def test_a_transform_after_the_wrapper_in_a_chain_is_refused(name, later):
    chain = optax.chain(WRAPPED[name], LATER[later])
    for optimizer in (chain, optax.MultiSteps(chain, 2), optax.chain(chain, optax.identity())):
        state = optimizer.init(PARAMS)
        with pytest.raises(ValueError, match="must be the last transform.*learning_rate=schedule"):
            jax.eval_shape(eval_params, state, PARAMS)
    first, _ = chain.init(PARAMS)
    eval_params(first, PARAMS)


def test_a_wrapper_may_be_followed_by_nothing_at_any_depth():
    labels = {"w": "ours", "bias": "sgd"}
    for name, optimizer in WRAPPED.items():
        several = optax.partition({"ours": WRAPPED[name], "sgd": optax.sgd(0.1)}, labels)
        for outer in (several, optax.MultiSteps(optimizer, 2), optax.chain(CLIP, optimizer)):
            eval_params(outer.init(PARAMS), PARAMS)

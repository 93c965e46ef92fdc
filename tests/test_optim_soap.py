"""SOAP and SOAP-Muon equal NumPy twins over 50 steps, inside the trainer's whole optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optimizer_twins import (
    ADAM_RATE,
    AXES,
    MATRICES,
    OPTIONS,
    RATE,
    STEPS,
    assert_histories_agree,
    draw,
    gradient,
    train_twin,
)
from soap_twin import SoapMuonTwin, SoapTwin

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.build import build_optimizer
from jaxtrain.optim.preconditioner import precondition
from jaxtrain.optim.recipes import group_rows, scale_by_soap, soap, soap_muon

MAX_SIDE = 8  # of the sides 6, 8, 10 and 6, one is too long


def soap_state(state):
    return state[-1].inner_states["matrices"].inner_state[0]


def sides_of(state, name, x):
    """Returns the (inputs', outputs') bases of one matrix."""
    bases = state.owned.input_basis[name], state.owned.output_basis[name]
    return [None if basis is None else np.asarray(basis[x]) for basis in bases]


def train_ours(**options):
    """Returns (params after each step, SoapState after the first step and after the last)."""
    jax.config.update("jax_enable_x64", True)
    optimizer = build_optimizer(OptimConfig(**OPTIONS | options), AXES)
    params = {name: jnp.asarray(x) for name, x in draw(0).items()}
    state, update, history, states = optimizer.init(params), jax.jit(optimizer.update), [], []
    for step in range(STEPS):
        updates, state = update(gradient(params, step), state, params)
        params = {name: p + updates[name] for name, p in params.items()}
        history.append(params)
        states.append(soap_state(state))
    assert update._cache_size() == 1  # steps that refresh the bases are not compiled again
    return history, states[0], states[-1]


@pytest.mark.parametrize(
    "name, twin, rate, every",
    [("soap", SoapTwin, ADAM_RATE, 3), ("soap_muon", SoapMuonTwin, RATE, 1)],
)
def test_params_factors_and_bases_equal_those_of_a_twin_over_50_steps(name, twin, rate, every):
    ours, first, last = train_ours(
        name=name, weight_decay=1.0, precondition_every=every, precondition_max_side=MAX_SIDE
    )
    members = [(key, x) for key in MATRICES for x in range(2)]
    twins = [twin(sides_of(first, *m), every, max_side=MAX_SIDE) for m in members]
    remaining = iter(twins)
    expected = train_twin(lambda: next(remaining), decay=1.0, rate=rate)
    assert_histories_agree(ours, expected)
    for member, other in zip(members, twins, strict=True):
        bases = sides_of(last, *member)
        assert [b is None for b in bases] == [n > MAX_SIDE for n in MATRICES[member[0]]]
        for basis, theirs in zip(bases, other.bases, strict=True):
            if basis is not None:  # an eigenvector's sign is arbitrary
                np.testing.assert_allclose(np.abs(basis.T @ theirs), np.eye(len(basis)), atol=1e-9)
        square = np.asarray(last.owned.square[member[0]][member[1]])
        np.testing.assert_allclose(square, other.square, rtol=1e-9)


def test_stepping_a_few_matrices_at_a_time_changes_nothing():
    axes, shape = Axes.parse("LT|F<-D"), (2, 3, 6, 6)
    optimizers = [scale_by_soap(axes, every=2, chunk_bytes=n) for n in (0, 2**20)]
    states = [optimizer.init(jnp.zeros(shape)) for optimizer in optimizers]
    rng = np.random.default_rng(0)
    for _ in range(4):
        g = jnp.asarray(rng.normal(size=shape))
        pairs = [jax.jit(o.update)(g, s) for o, s in zip(optimizers, states, strict=True)]
        updates, states = zip(*pairs, strict=True)
        np.testing.assert_allclose(*updates, atol=1e-12)


def test_the_first_bases_of_a_factor_of_full_rank_equal_numpys():
    rng = np.random.default_rng(0)
    axes, twins = Axes.parse("L|D->F"), [SoapTwin(None, 2) for _ in range(2)]
    jax.config.update("jax_enable_x64", True)
    optimizer = scale_by_soap(axes, every=2)
    state, update = optimizer.init(jnp.zeros((2, 5, 5))), jax.jit(optimizer.update)
    for _ in range(5):
        g = rng.normal(size=(2, 5, 5))
        u, state = update(jnp.asarray(g), state)
        for x, twin in enumerate(twins):
            np.testing.assert_allclose(u[x], twin(g[x]), atol=1e-11)


FLOAT32_AXES = {"w": Axes.parse("L|D->HK"), "gain": Axes.parse("|D")}
FLOAT32_SHAPES = {"w": (2, 12, 2, 6), "gain": (12,)}


def float32_gradients(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    normal = lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    return {name: normal(shape) for name, shape in FLOAT32_SHAPES.items()}


def float32_train(optimizer, container=dict):
    """Returns (params, state) after 4 steps, with the parameters in a container."""
    params = container(float32_gradients(0))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(4):
        updates, state = update(container(float32_gradients(1 + step)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_bad_steps_change_nothing_even_where_the_bases_are_due():
    cfg = OptimConfig(name="soap", weight_decay=0.1, precondition_every=1, ns_dtype="float32")
    optimizer, params = build_optimizer(cfg, FLOAT32_AXES), float32_gradients(0)
    update, bad = jax.jit(optimizer.update), jax.tree.map(lambda g: g * jnp.nan, params)
    plain = interrupted = optimizer.init(params)
    for step in range(3):
        updates, after = update(bad, interrupted, params, good=False)
        assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
        jax.tree.map(np.testing.assert_array_equal, after, interrupted)
        _, interrupted = update(float32_gradients(step), after, params, good=True)
        _, plain = update(float32_gradients(step), plain, params, good=True)
    jax.tree.map(np.testing.assert_array_equal, plain, interrupted)


def test_bases_of_bfloat16_gradients_are_float32_and_stay_orthogonal():
    axes = FLOAT32_AXES["w"]
    optimizer = scale_by_soap(axes, every=1)
    g = [float32_gradients(seed)["w"].astype(jnp.bfloat16) for seed in range(40)]
    state, update = optimizer.init(g[0]), jax.jit(optimizer.update)
    for x in g:
        u, state = update(x, state)
    owned = state.owned
    assert {x.dtype for x in (u, *owned)} == {jnp.dtype("float32")}
    for basis_XNN in (owned.input_basis, owned.output_basis):
        gram_XNN = np.einsum("xij,xik->xjk", basis_XNN, basis_XNN)
        assert np.abs(gram_XNN - np.eye(gram_XNN.shape[-1])).max() < 2e-6


def test_soap_muon_does_not_depend_on_the_size_of_small_float32_gradients():
    cfg = OptimConfig(
        name="soap_muon", clip_norm=0.0, precondition_every=1, ns_dtype="float32", warmup_steps=0
    )
    optimizer, params = build_optimizer(cfg, FLOAT32_AXES), float32_gradients(0)
    update = jax.jit(optimizer.update)

    def steps(scale):
        state = optimizer.init(params)
        for seed in range(4):
            updates, state = update(float32_gradients(seed, scale), state, params)
        return updates["w"]

    np.testing.assert_allclose(steps(2.0**-24), steps(1.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "field, value",
    [("decay", 1.0), ("every", 0), ("max_side", 0)],
)
def test_options_out_of_range_name_their_flag(field, value):
    options = {"decay": 0.9, "every": 1, "max_side": 8} | {field: value}
    with pytest.raises(ValueError, match=f"--optim.precondition_{field}"):
        precondition(FLOAT32_AXES["w"], lambda *args: args, **options)


def test_soap_muon_refuses_other_geometries():
    with pytest.raises(ValueError, match="optim.geometry"):
        OptimConfig(name="soap_muon", geometry="sign")


@pytest.mark.parametrize("recipe", [soap, soap_muon])
def test_a_recipe_is_bitwise_the_trainers_optimizer(recipe):
    shared = {"momentum": 0.9, "weight_decay": 0.1, "adam_learning_rate": 0.01}
    rates = {"learning_rate": 0.01} if recipe is soap else {"learning_rate": 0.05}
    cfg = OptimConfig(
        name=recipe.__name__,
        clip_norm=0.0,
        schedule="constant",
        warmup_steps=0,
        precondition_every=2,
        **shared | rates,
    )
    complete = recipe(FLOAT32_AXES, **shared, **rates, decay=0.95, every=2)
    optimizers = complete, build_optimizer(cfg, FLOAT32_AXES)
    (ours, state), (theirs, their_state) = (float32_train(o) for o in optimizers)
    compare = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    compare((ours, jax.tree.leaves(state)), (theirs, jax.tree.leaves(their_state)))
    assert [row.optimizer for row in group_rows(complete, ours)] == ["adamw", recipe.__name__]


def test_soap_trains_an_nnx_state_with_injected_hyperparameters():
    options = {"axes": {"w": "L|D->HK"}, "learning_rate": 1e-2, "every": 2}
    injected = optax.inject_hyperparams(soap, static_args=("axes", "max_side"))(**options)
    as_state = lambda tree: nnx.State({k: nnx.Param(x) for k, x in tree.items()})
    ours, _ = float32_train(injected, as_state)
    expected, _ = float32_train(soap(**options))
    for name, x in expected.items():
        np.testing.assert_allclose(ours[name][...], x, rtol=1e-4, atol=1e-5)


def test_scale_by_soap_refuses_vectors_and_names_the_complete_optimizer():
    with pytest.raises(ValueError, match="gain.*Use soap,"):
        scale_by_soap(FLOAT32_AXES).init(float32_gradients(0))

"""Complete optimizers without a config, on parameter trees of any kind."""

import functools
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

from jaxtrain.config.sections import OptimConfig
from jaxtrain.optim import recipes
from jaxtrain.optim.acceleration import ema_lookahead, gradient_transport
from jaxtrain.optim.adam import scale_by_adam
from jaxtrain.optim.build import build_optimizer
from jaxtrain.optim.clipping import clip_gradients
from jaxtrain.optim.noise import heavy_tailed_noise
from jaxtrain.optim.recipes import accelerated_lmo, muon, normuon, scale_by_muon

RECIPES = [muon, normuon, accelerated_lmo]
EVERY_RECIPE = [*RECIPES, recipes.soap, recipes.soap_muon, recipes.muon_h, recipes.adam_h]
EVERY_RECIPE.append(recipes.muown)
SHAPES = {"embed": (8, 4), "blocks": {"w": (4, 6), "bias": (6,)}, "head": (4, 8)}
AXES = {"embed": "V|D", "blocks.w": "|D->F", "blocks.bias": "|F", "head": "|D->V"}
RATES = {"learning_rate": 0.05, "adam_learning_rate": 0.01}


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def train(optimizer, params, steps=3, seed=1):
    """Returns (params, state) after steps with the same gradients for every optimizer."""
    grads = [
        jax.tree.map(lambda p, i=i: jnp.sin(i + 3 * p), params) for i in range(seed, seed + steps)
    ]
    state = optimizer.init(params)
    advance = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
    for g in grads:
        updates, state = advance(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_near(ours, theirs, rtol=1e-6, atol=1e-7):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def rows_of(optimizer, params):
    return {row.name: row for row in recipes.group_rows(optimizer, params)}


@pytest.mark.parametrize("recipe", [*RECIPES, recipes.muown])
def test_a_recipe_is_bitwise_the_trainers_optimizer(recipe):
    shared = dict(momentum=0.9, weight_decay=0.1)
    cfg = OptimConfig(
        name=recipe.__name__,
        clip_norm=0.0,
        schedule="constant",
        warmup_steps=0,
        decay_groups="matrices,embedding,head",
        **RATES,
        **shared,
        **({"strength": 0.3} if recipe is accelerated_lmo else {}),
        **({"scale": "match_rms"} if recipe is recipes.muown else {}),
    )
    axes = recipes.resolve_axes(AXES, tree())
    options = RATES | shared
    options |= {"strength": 0.3} if recipe is accelerated_lmo else {}
    ours, state = train(recipe(**options), tree())
    theirs, their_state = train(build_optimizer(cfg, axes), tree())
    # XLA may round transport's fused sums differently, as the schedule is another program.
    compare = assert_near if recipe is accelerated_lmo else assert_same
    compare((ours, jax.tree.leaves(state)), (theirs, jax.tree.leaves(their_state)))


@functools.cache
def compile_update(recipe):
    """Returns (optimizer, compiled update of tree())."""
    optimizer = recipe(**RATES)
    return optimizer, jax.jit(lambda g, s, good: optimizer.update(g, s, tree(), good=good))


@pytest.mark.parametrize("recipe", RECIPES)
def test_muon_steps_matrices_and_adamw_everything_else(recipe):
    rows = rows_of(recipe(**RATES), tree())
    assert {name: row.decay for name, row in rows.items()} == {
        **dict.fromkeys(["blocks.w", "embed", "head"], 0.1),
        "blocks.bias": 0.0,
    }
    steppers = {name: row.optimizer for name, row in rows.items()}
    assert steppers.pop("blocks.w") == recipe.__name__
    assert set(steppers.values()) == {"adamw"}
    assert (rows["blocks.w"].rate, rows["embed"].rate) == (0.05, 0.01)
    grads = jax.tree.map(jnp.sin, tree())
    adam = optax.adamw(0.01, b2=0.95, weight_decay=0.1)
    theirs, _ = jax.jit(adam.update)(grads, adam.init(tree()), tree())
    optimizer, update = compile_update(recipe)
    ours, _ = update(grads, optimizer.init(tree()), True)
    np.testing.assert_allclose(ours["embed"], theirs["embed"], rtol=1e-4)
    singular = np.linalg.svd(
        ours["blocks"]["w"] / 0.05 + 0.1 * tree()["blocks"]["w"], compute_uv=False
    )
    ahead = 1 + 0.25 * 9 if recipe is accelerated_lmo else 1  # transport moves the query point
    assert np.all((0.6 * ahead < singular) & (singular < 1.3 * 1.5**0.5 * ahead))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "axes, shape", [("L|D->F", (4, 6)), ("|D->F", (2, 4, 6)), ("|D->D", (4, 6))]
)
def test_axes_that_do_not_fit_are_refused_with_path_shape_and_axes(recipe, axes, shape):
    params = {"blocks": {"w": jnp.zeros(shape)}}
    for optimizer in (recipe(axes={"blocks.w": axes}), scale_by_muon({"blocks": {"w": axes}})):
        with pytest.raises(ValueError) as error:
            optimizer.init(params)
        assert all(part in str(error.value) for part in ("blocks.w", str(shape), axes))


def test_scale_by_muon_refuses_what_is_no_matrix_by_name():
    with pytest.raises(ValueError, match=r"blocks.bias with axes '\|D', role vector. Use muon"):
        scale_by_muon().init(tree())


def test_the_iterate_of_an_nnx_module_is_that_of_its_plain_dict():
    net, linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(linear, nnx.Param))
    grads = jax.tree.map(jnp.sin, params)
    transform = accelerated_lmo(**RATES)
    optimizer = nnx.Optimizer(net, transform, wrt=nnx.Param)
    step = nnx.jit(lambda net, optimizer, grads: optimizer.update(net, grads))
    step(net, optimizer, jax.tree.map(jnp.sin, nnx.state(net, nnx.Param)))
    updates, state = jax.jit(transform.update)(grads, transform.init(params), params)
    ahead = optax.apply_updates(params, updates)
    iterate = recipes.eval_params(optimizer.opt_state, nnx.state(net, nnx.Param))
    assert_near(iterate, recipes.eval_params(state, ahead))
    assert not jnp.array_equal(iterate["kernel"], ahead["kernel"])
    nnx.update(net, iterate)


class Linear(eqx.Module):
    weight: jax.Array | None
    bias: jax.Array
    activation: Callable | None = None

    def __call__(self, x):
        return x


LIBRARIES = {
    "flax.linen": lambda w, b: FrozenDict({"Dense_0": {"kernel": w, "bias": b}}),
    "flax.nnx": lambda w, b: nnx.State({"l": {"kernel": nnx.Param(w), "bias": nnx.Param(b)}}),
    "equinox": lambda w, b: Linear(w.T, b),
}


def test_parameters_of_flax_and_equinox_are_stepped_as_plain_dicts():
    """An Equinox module is callable, and its weight has its outputs first."""
    w, b = tree()["blocks"].pop("w"), tree()["blocks"].pop("bias")
    optimizer = accelerated_lmo(**RATES)
    plain, _ = train(optimizer, {"w": w, "b": b})
    for name, build in LIBRARIES.items():
        params = build(w, b)
        new, _ = train(optimizer, params)
        assert jax.tree.structure(new) == jax.tree.structure(params)
        leaves = {x.ndim: x for x in jax.tree.leaves(new)}
        assert_near(leaves[2].T if name == "equinox" else leaves[2], plain["w"], atol=1e-3)
        assert_near(leaves[1], plain["b"])
        assert {row.scale for row in recipes.group_rows(optimizer, params)} == {1, 1.5**0.5}


@pytest.mark.parametrize("recipe", RECIPES)
def test_injected_hyperparameters_give_the_steps_of_fixed_ones(recipe):
    numbers = RATES | dict(weight_decay=0.1, momentum=0.9, adam_b1=0.8, adam_eps=1e-7)
    numbers |= {"strength": 0.2} if recipe is accelerated_lmo else {}
    numbers |= {"neuron_decay": 0.9} if recipe is normuon else {}
    injected = optax.inject_hyperparams(recipe)(**numbers)
    ours, state = train(injected, tree())
    assert set(numbers) <= set(state.hyperparams)
    assert_near(ours, train(recipe(**numbers), tree())[0], rtol=2e-3, atol=1e-5)
    assert {row.rate for row in recipes.group_rows(injected, tree())} == {"injected"}


INNER = optax.sgd(0.1)
WITH_NUMBERS = [
    *((recipe, {"learning_rate": 0.1}) for recipe in EVERY_RECIPE),
    (gradient_transport, {"inner": INNER, "momentum": 0.9, "strength": 0.3}),
    (ema_lookahead, {"inner": INNER, "strength": 0.3, "decay": 0.9}),
    (scale_by_adam, {"b1": 0.0, "b2": 0.9, "eps": 1e-8}),
    (clip_gradients, {"max_norm": 1.0, "eps": 1e-6}),
    (heavy_tailed_noise, {"alpha": 1.5, "scale": 0.1}),
]


@pytest.mark.parametrize("factory, numbers", WITH_NUMBERS, ids=lambda x: getattr(x, "__name__", ""))
def test_numbers_of_every_transform_may_be_values_of_the_program(factory, numbers):
    static = {"max_side"} & set(inspect.signature(factory).parameters)
    injected = optax.inject_hyperparams(factory, static_args=static)(**numbers)
    state = jax.eval_shape(injected.init, tree())
    _, new = jax.eval_shape(injected.update, tree(), state, tree())
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)


def test_schedules_and_injected_schedules_give_the_same_steps():
    rates = dict.fromkeys(RATES, optax.linear_schedule(0.05, 0.01, 3))
    ours, state = train(optax.inject_hyperparams(muon)(**rates), tree())
    assert state.hyperparams["learning_rate"] == pytest.approx(0.05 - 0.04 * 2 / 3)
    assert_near(ours, train(muon(**rates), tree())[0], rtol=1e-3, atol=1e-4)


def test_hyperparameters_of_the_bare_transform_can_be_injected():
    w = {"w": tree()["blocks"]["w"]}
    injected = optax.inject_hyperparams(scale_by_muon)(momentum=0.9)
    ours, theirs = (train(o, w, steps=1)[0] for o in (injected, scale_by_muon(momentum=0.9)))
    assert_near(ours, theirs, rtol=1e-2, atol=1e-3)


def test_multi_transform_with_axes_of_the_whole_tree_steps_its_own_part():
    labels = {"embed": "sgd", "blocks": {"w": "ours", "bias": "ours"}, "head": "sgd"}
    ours = accelerated_lmo(**RATES, axes=AXES)
    whole = optax.multi_transform({"ours": ours, "sgd": optax.sgd(0.1)}, labels)
    part = {"blocks": tree()["blocks"]}
    stepped = train(accelerated_lmo(**RATES), part)[0]
    assert_same(train(whole, tree())[0]["blocks"], stepped["blocks"])
    steppers = {name: row.optimizer for name, row in rows_of(whole, tree()).items()}
    other = dict.fromkeys(["embed", "head"], "another transform")
    assert steppers == {"blocks.bias": "adamw", "blocks.w": "accelerated_lmo"} | other


def test_a_masked_bare_muon_with_axes_of_the_whole_tree_works():
    mask = jax.tree.map(lambda x: False, tree()) | {"blocks": {"w": True, "bias": False}}
    train(optax.masked(scale_by_muon(AXES), mask), tree())


TREES = {
    "containers": {"w": (4, 6), "none": None, "list": [{"w": (6, 4)}, ((4, 4), None)], "one": ()},
    "only matrices": {"w": (4, 6)},
    "no matrix": {"bias": (4,)},
    "empty": {},
}


@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_trees_of_any_containers_are_stepped_and_their_state_keeps_its_types(recipe):
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    optimizer = recipe(**RATES)
    for shapes in TREES.values():
        params = jax.tree.map(lambda s: jnp.full(s, 0.1), shapes, is_leaf=is_shape)
        for dtype in (jnp.float32, jnp.bfloat16):
            params = optax.tree.cast(params, dtype)
            state = jax.eval_shape(optimizer.init, params)
            updates, new = jax.eval_shape(optimizer.update, params, state, params)
            assert types(updates) == types(params) and types(new) == types(state)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_can_be_pickled_and_is_the_same_from_a_compiled_init(recipe):
    state = jax.jit(recipe(**RATES).init)(tree())
    assert_same(pickle.loads(pickle.dumps(state)), state)
    assert_same(state, recipe(**RATES).init(tree()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_gradient_changes_nothing(recipe):
    optimizer, update = compile_update(recipe)
    state, grads = optimizer.init(tree()), jax.tree.map(lambda x: x * jnp.nan, tree())
    updates, after = update(grads, state, False)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    assert_same(after, state)


def test_describe_prints_a_table_of_every_parameter(capsys):
    schedule = optax.cosine_decay_schedule(0.05, 10)
    chain = optax.chain(optax.clip_by_global_norm(1.0), muon(None, schedule, 0.1))
    recipes.describe(chain, jax.eval_shape(tree))
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == "name axes view group optimizer geometry scale rate decay".split()
    assert "blocks.w |I->O 1x4x6 matrices muon spectral 1.225 schedule 0.1" in [
        " ".join(line.split()) for line in lines
    ]
    assert len(lines) == 4
    axes = recipes.resolve_axes(None, tree())
    recipes.describe(build_optimizer(OptimConfig(rest="lmo"), axes), tree())
    assert "column_norm" in capsys.readouterr().out
    with pytest.raises(ValueError, match="optimizer must come from"):
        recipes.describe(optax.adam(0.1), tree())


def test_recipes_do_not_import_flax():
    code = "import sys, jaxtrain.optim.recipes; print([m for m in sys.modules if 'flax' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

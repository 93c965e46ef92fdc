import ast
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.accelerated_lmo import accelerated_lmo
from jaxtrain.optim.acceleration import (
    ema_lookahead,
    eval_params,
    gradient_transport,
)
from jaxtrain.optim.build import ACCELERATIONS, build_optimizer
from jaxtrain.optim.muon import muon

AXES = {"w": Axes.parse("|D->F")}
PACKAGE = Path(__file__).parent.parent / "jaxtrain"
INSIDE_THE_STEP = (
    *("step.py", "diagnostic_step.py", "phases.py"),
    *("jax_train.py", "rounding.py", "traced_step.py"),
)
MOVES_BOTH = ("fragments.py",)  # an exchange between sites moves the iterate and the query point
SHAPES_ONLY = ("compiled.py", "outer_state.py")  # they read a state that has no values


def weights(seed=0):
    return {"w": jax.random.normal(jax.random.key(seed), (8, 12))}


def inner(momentum=0.9, rate=0.02, decay=0.1):
    return muon(AXES, rate, decay, momentum=momentum, nesterov=False, dtype=jnp.float32)


def gradient(params, seed):
    """Returns the gradient of a quadratic plus noise drawn from the seed."""
    noise = jax.random.normal(jax.random.key(seed), (8, 12))
    return jax.tree.map(lambda p: 0.5 * p + 0.1 * noise, params)


def train(optimizer, steps=40, good=lambda i: True):
    """Returns (iterates, query points), one of each after every step."""
    params = weights()
    state = optimizer.init(params)

    @jax.jit
    def advance(params, state, seed, good):
        grads = gradient(params, seed)
        updates, state = optimizer.update(grads, state, params, good=good)
        return optax.apply_updates(params, updates), state

    iterates, queries = [], []
    for i in range(steps):
        params, state = advance(params, state, i, good(i))
        iterates.append(np.asarray(eval_params(state, params)["w"]))
        queries.append(np.asarray(params["w"]))
    return iterates, queries


WRAPPERS = {
    "transport": lambda inner, strength, **kw: gradient_transport(inner, 0.9, strength, **kw),
    "lookahead": ema_lookahead,
}


def test_at_strength_zero_compiled_steps_are_those_of_the_inner_optimizer_bitwise():
    options = {"nesterov": False, "weight_decay": 0.1, "geometry": "frobenius"}
    start = {"w": jax.random.normal(jax.random.key(0), (16, 24))}
    grads = {"w": jax.random.normal(jax.random.key(1), (20, 16, 24))}

    def run(**more):
        optimizer = build_optimizer(OptimConfig(**options, **more), AXES)

        # The other tests' flags would turn off the fused multiply-add that makes a difference.
        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
        def advance(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = start, optimizer.init(start)
        for i in range(20):
            params, state = advance(params, state, {"w": grads["w"][i]})
        return params, state

    want = run(name="muon")
    for acceleration in ACCELERATIONS:
        got = run(name="accelerated_lmo", strength=0.0, acceleration=acceleration)
        np.testing.assert_array_equal(got[0]["w"], want[0]["w"])
        jax.tree.map(np.testing.assert_array_equal, got[1], want[1])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_schedule_at_zero_differs_from_the_inner_optimizer_by_rounding_only(wrapper):
    plain = optax.with_extra_args_support(inner())
    wrapped, queries = train(WRAPPERS[wrapper](inner(), lambda count: 0.0 * count))
    np.testing.assert_array_equal(wrapped, queries)
    np.testing.assert_allclose(wrapped, train(plain)[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_transport_replaces_nesterov_momentum_in_every_accelerated_group(acceleration):
    axes = {"vector": Axes.parse("|D"), "embed": Axes.parse("V|D")}
    params = {"vector": jnp.arange(4.0), "embed": jnp.arange(12.0).reshape(3, 4)}
    fixed = {"name": "accelerated_lmo", "rest": "lmo", "acceleration": acceleration}

    def steps(**options):
        optimizer = build_optimizer(OptimConfig(**fixed, **options), axes)
        update = jax.jit(optimizer.update)
        state = jax.jit(optimizer.init)(params)
        for grads in (params, jax.tree.map(jnp.flip, params)):
            updates, state = update(grads, state, params)
        return updates

    def same(**options):
        updates = (steps(nesterov=nesterov, **options) for nesterov in (True, False))
        return jax.tree.all(jax.tree.map(np.array_equal, *updates))

    assert same(accelerate_all=True) == (acceleration == "transport")
    assert not same(accelerate_all=False)


def test_transport_equals_its_definition_with_two_sequences():
    momentum, strength = 0.9, 0.25
    reach, plain = strength * momentum / (1 - momentum), inner(momentum)
    z, u, state, want = weights(), {"w": jnp.zeros((8, 12))}, plain.init(weights()), []
    for i in range(40):
        x = jax.tree.map(lambda z, u: z + reach * u, z, u)
        u, state = jax.jit(plain.update)(gradient(x, i), state, z)
        z = optax.apply_updates(z, u)
        want.append(np.asarray(z["w"]))
    got, _ = train(gradient_transport(inner(momentum), momentum, strength))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_lookahead_equals_its_definition_with_two_sequences():
    strength, decay, plain = 0.6, 0.95, inner()
    z, look, state, want = weights(), {"w": jnp.zeros((8, 12))}, plain.init(weights()), []
    for i in range(40):
        x = jax.tree.map(lambda z, d: z + strength * d, z, look)
        u, state = jax.jit(plain.update)(gradient(x, i), state, x)
        after = optax.apply_updates(x, u)
        look = jax.tree.map(lambda d, a, z: decay * d + (1 - decay) * (a - z), look, after, z)
        z = after
        want.append(np.asarray(z["w"]))
    got, _ = train(ema_lookahead(inner(), strength, decay))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_schedule_may_turn_the_wrapper_on_and_off(wrapper):
    on = lambda count: jnp.where((count >= 3) & (count < 6), 0.5, 0.0)
    iterates, queries = train(WRAPPERS[wrapper](inner(), on), steps=10)
    ahead = [not np.array_equal(z, x) for z, x in zip(iterates, queries, strict=True)]
    assert any(ahead[2:6]) and not any(ahead[:2]) and not any(ahead[7:])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_bad_step_changes_neither_iterate_nor_query_point_nor_state(wrapper):
    wrapped = WRAPPERS[wrapper](inner(), 0.3)
    iterates, queries = train(wrapped, 6, good=lambda i: i != 4)
    np.testing.assert_array_equal(iterates[4], iterates[3])
    np.testing.assert_array_equal(queries[4], queries[3])
    assert not np.array_equal(queries[5], queries[4])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_bfloat16_buffer_changes_the_iterate_little(wrapper):
    make = WRAPPERS[wrapper]
    wide, _ = train(make(inner(), 0.25))
    narrow, _ = train(make(inner(), 0.25, buffer_dtype=jnp.bfloat16))
    off = np.linalg.norm(narrow[-1] - wide[-1]) / np.linalg.norm(wide[-1])
    assert off < 5e-3
    buffers = jax.tree.leaves(make(inner(), 0.25, buffer_dtype=jnp.bfloat16).init(weights()))
    assert sum(x.nbytes for x in buffers if x.ndim) == 8 * 12 * (4 + 2)


def test_eval_params_finds_nested_wrappers_inside_chains():
    wrapped = ema_lookahead(gradient_transport(inner(), 0.9, 0.3), 0.4)
    nested = optax.chain(optax.identity(), wrapped)
    iterates, queries = train(optax.with_extra_args_support(nested), steps=5)
    single, _ = train(ema_lookahead(inner(), 0.4), steps=5)
    assert not np.array_equal(iterates[-1], queries[-1])
    assert np.linalg.norm(iterates[-1] - single[-1]) < np.linalg.norm(queries[-1] - single[-1])


def test_accelerated_lmo_is_muon_without_nesterov_inside_transport():
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "dtype": jnp.float32}
    got, _ = train(accelerated_lmo(AXES, **options))
    want, _ = train(gradient_transport(inner(), 0.9, 0.25))
    np.testing.assert_array_equal(got[-1], want[-1])


def test_only_eval_params_reads_the_params_of_a_train_state():
    """Only the training step and its diagnostics need the query point; others would misuse it."""
    readers = {}
    for path in PACKAGE.rglob("*.py"):
        excepted = *INSIDE_THE_STEP, *MOVES_BOTH, *SHAPES_ONLY
        if path.parent.name == "benchmarks" or path.name in excepted:
            continue
        if ".params" not in (text := path.read_text()):
            continue
        nodes = list(ast.walk(ast.parse(text)))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        arguments = {
            id(argument)
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "eval_params"
            for argument in call.args
        }
        reads = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == "params"]
        if reads:
            readers[str(path.relative_to(PACKAGE))] = all(id(read) in arguments for read in reads)
    expected = [
        *("training/evaluation.py", "training/sampling.py"),
        *("interop/import_export.py", "interop/run_weights.py", "interop/text_model.py"),
        *("branching/merge.py", "crosscheck/pretrained.py"),
    ]
    assert readers == dict.fromkeys(expected, True)


@pytest.mark.parametrize(
    "build, flag",
    [
        (lambda: gradient_transport(inner(), 1.0, 0.5), "optim.momentum"),
        (lambda: gradient_transport(inner(), 0.9, -0.5), "optim.strength"),
        (lambda: ema_lookahead(inner(), 0.5, 1.0), "optim.lookahead_decay"),
        (lambda: ema_lookahead(inner(), 1.0), "optim.strength"),
    ],
)
def test_values_out_of_range_name_their_flag(build, flag):
    with pytest.raises(ValueError, match=f"--{flag}"):
        build()

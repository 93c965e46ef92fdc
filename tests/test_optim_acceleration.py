import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.optim.acceleration import ema_lookahead, eval_params, transported
from jaxtrain.optim.recipes import accelerated_lmo, muon

AXES = {"w": Axes.parse("|D->F")}
PACKAGE = Path(__file__).parent.parent / "jaxtrain"


def weights(seed=0):
    return {"w": jax.random.normal(jax.random.key(seed), (8, 12))}


def inner(momentum=0.9, rate=0.02, decay=0.1):
    return muon(AXES, rate, decay, momentum, nesterov=False, dtype=jnp.float32)


def gradient(params, seed):
    """Of a quadratic, with noise that the seed names."""
    noise = jax.random.normal(jax.random.key(seed), (8, 12))
    return jax.tree.map(lambda p: 0.5 * p + 0.1 * noise, params)


def run(optimizer, steps=40, good=lambda i: True):
    """(iterates, query points), one of each after every step."""
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
    "transport": lambda inner, strength, **kw: transported(inner, 0.9, strength, **kw),
    "lookahead": ema_lookahead,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_at_strength_zero_the_wrapper_is_the_inner_optimizer_bitwise(wrapper):
    plain = optax.with_extra_args_support(inner())
    wrapped, _ = run(WRAPPERS[wrapper](inner(), 0.0))
    for a, b in zip(wrapped, run(plain)[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_transport_equals_its_two_sequences():
    momentum, strength = 0.9, 0.25
    reach, plain = strength * momentum / (1 - momentum), inner(momentum)
    z, u, state, want = weights(), {"w": jnp.zeros((8, 12))}, plain.init(weights()), []
    for i in range(40):
        x = jax.tree.map(lambda z, u: z + reach * u, z, u)
        u, state = jax.jit(plain.update)(gradient(x, i), state, z)
        z = optax.apply_updates(z, u)
        want.append(np.asarray(z["w"]))
    got, _ = run(transported(inner(momentum), momentum, strength))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_lookahead_equals_its_two_sequences():
    strength, decay, plain = 0.6, 0.95, inner()
    z, look, state, want = weights(), {"w": jnp.zeros((8, 12))}, plain.init(weights()), []
    for i in range(40):
        x = jax.tree.map(lambda z, d: z + strength * d, z, look)
        u, state = jax.jit(plain.update)(gradient(x, i), state, x)
        after = optax.apply_updates(x, u)
        look = jax.tree.map(lambda d, a, z: decay * d + (1 - decay) * (a - z), look, after, z)
        z = after
        want.append(np.asarray(z["w"]))
    got, _ = run(ema_lookahead(inner(), strength, decay))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_schedule_may_turn_the_wrapper_on_and_off(wrapper):
    on = lambda count: jnp.where((count >= 3) & (count < 6), 0.5, 0.0)
    iterates, queries = run(WRAPPERS[wrapper](inner(), on), steps=10)
    ahead = [not np.array_equal(z, x) for z, x in zip(iterates, queries, strict=True)]
    assert any(ahead[2:6]) and not any(ahead[:2]) and not any(ahead[7:])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_bad_step_leaves_iterate_query_and_state(wrapper):
    wrapped = WRAPPERS[wrapper](inner(), 0.3)
    iterates, queries = run(wrapped, 6, good=lambda i: i != 4)
    np.testing.assert_array_equal(iterates[4], iterates[3])
    np.testing.assert_array_equal(queries[4], queries[3])
    assert not np.array_equal(queries[5], queries[4])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_narrow_buffer_moves_the_iterate_little(wrapper):
    make = WRAPPERS[wrapper]
    wide, _ = run(make(inner(), 0.25))
    narrow, _ = run(make(inner(), 0.25, buffer_dtype=jnp.bfloat16))
    off = np.linalg.norm(narrow[-1] - wide[-1]) / np.linalg.norm(wide[-1])
    assert off < 5e-3
    buffers = jax.tree.leaves(make(inner(), 0.25, buffer_dtype=jnp.bfloat16).init(weights()))
    assert sum(x.nbytes for x in buffers if x.ndim) == 8 * 12 * (4 + 2)


def test_eval_params_undoes_wrappers_inside_wrappers_and_chains():
    nested = optax.chain(optax.identity(), ema_lookahead(transported(inner(), 0.9, 0.3), 0.4))
    iterates, queries = run(optax.with_extra_args_support(nested), steps=5)
    still, _ = run(ema_lookahead(inner(), 0.4), steps=5)
    assert not np.array_equal(iterates[-1], queries[-1])
    assert np.linalg.norm(iterates[-1] - still[-1]) < np.linalg.norm(queries[-1] - still[-1])


def test_the_recipe_is_transported_muon_without_nesterov():
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "dtype": jnp.float32}
    got, _ = run(accelerated_lmo(AXES, **options))
    want, _ = run(transported(inner(), 0.9, 0.25))
    np.testing.assert_array_equal(got[-1], want[-1])


def test_weights_leave_the_step_only_through_eval_params():
    """Outside the step and its trace, a state's params are read only through eval_params."""
    readers = {}
    for path in PACKAGE.rglob("*.py"):
        names = ("step.py", "diagnostic_step.py", "phases.py", "jax_train.py")
        inside = path.name in names or path.parent.name == "benchmarks"
        if inside:
            continue
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        through = {
            id(arg)
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "eval_params"
            for arg in call.args
        }
        reads = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "params"
        ]
        if reads:
            readers[str(path.relative_to(PACKAGE))] = all(id(node) in through for node in reads)
    outside = ["evaluate.py", "generate.py", "interop/runs.py", "crosscheck/pretrained.py"]
    assert readers == dict.fromkeys(outside, True)


@pytest.mark.parametrize(
    "build, flag",
    [
        (lambda: transported(inner(), 1.0, 0.5), "optim.momentum"),
        (lambda: transported(inner(), 0.9, -0.5), "optim.strength"),
        (lambda: ema_lookahead(inner(), 0.5, 1.0), "optim.lookahead_decay"),
        (lambda: ema_lookahead(inner(), 1.0), "optim.strength"),
    ],
)
def test_values_out_of_range_name_their_flag(build, flag):
    with pytest.raises(ValueError, match=f"--{flag}"):
        build()

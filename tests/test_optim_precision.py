"""Optimizers compute averages in their widest type and store them in a type that never changes.

Each case steps one tree, whose leaves are pairs of a parameter's and a gradient's type. All of them
have the same values, which bfloat16 represents exactly, so that the float64 leaf is the
reference for the others.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.acceleration import ema_lookahead, eval_params, gradient_transport
from jaxtrain.optim.build import OPTIMIZERS, build_optimizer
from jaxtrain.optim.clipping import clip_gradients
from jaxtrain.optim.noise import heavy_tailed_noise

STEPS = 80  # averages with a decay of 0.95 converge in fewer
TYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float64": jnp.float64}
PAIRS = [(param, grad) for param in TYPES for grad in TYPES]
NARROW = [("bfloat16", "float64"), ("float32", "bfloat16"), ("float64", "float32")]
# With NARROW's, all pairs but twice float32, which every other test of an optimizer uses.
WIDE = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64")]
WIDE += [("float64", "bfloat16"), ("float64", "float64")]
REFERENCE = "float64", "float64"
# Matrices are [4,6]. SOAP's first factor of the longer side would lack full rank: many eigenbases.
SHARED = {"ns_dtype": "float32", "weight_decay": 0.1, "total_steps": STEPS}
SHARED |= {"precondition_max_side": 4}
LOOKAHEAD = {"name": "accelerated_lmo", "acceleration": "ema_lookahead"}
CASES = [*({"name": name} for name in OPTIMIZERS), LOOKAHEAD]
# Largest relative error of a buffer or a sum of updates, by the type that stores it. Steps of
# bfloat16 parameters are rounded to that type, and so is what wrappers store of them.
TOLERANCES = {"bfloat16": 1.5e-2, "float32": 1e-5, "float64": 1e-12}
EIGENVECTORS = 20  # how much SOAP's bases amplify the errors of their factors


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def values(shape=(4, 6)):
    """Returns (params, gradients [STEPS,...]) in bfloat16: noise about a mean that declines."""
    rng = np.random.default_rng(0)
    decline = np.linspace(2, 1, STEPS).reshape(-1, *[1] * len(shape))
    grads = decline * rng.normal(size=shape) + 0.2 * rng.normal(size=(STEPS, *shape))
    return [np.asarray(x).astype(jnp.bfloat16) for x in (rng.normal(size=shape), grads)]


def run(cfg, pairs):
    """Returns (state, sum of updates) after STEPS steps at fixed params."""
    cfg = dataclasses.replace(cfg, clip_norm=len(pairs) ** 0.5)  # of each array: 1
    optimizer = build_optimizer(cfg, {"_".join(pair): Axes.parse("|D->F") for pair in pairs})
    p, g = values()
    params = {f"{a}_{b}": jnp.asarray(p, TYPES[a]) for a, b in pairs}
    grads = {f"{a}_{b}": jnp.asarray(g, TYPES[b]) for a, b in pairs}

    def scan(state, params, grads):
        def advance(carry, grads):
            state, total = carry
            updates, state = optimizer.update(grads, state, params)
            assert [u.dtype for u in updates.values()] == [p.dtype for p in params.values()]
            return (state, jax.tree.map(jnp.add, total, updates)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float64), params)
        return jax.lax.scan(advance, (state, zeros), grads)[0]

    return jax.jit(scan)(optimizer.init(params), params, grads)


def leaves_by_pair(tree):
    """Returns {path without the pair: {pair: leaf}} of the leaves that belong to a parameter."""
    leaves = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        for pair in PAIRS:
            key = f"['{'_'.join(pair)}']"
            if key in name:
                leaves.setdefault(name.replace(key, ""), {})[pair] = x
    return leaves


def check_errors(got, want, narrow=(), factor=1):
    """Checks each leaf against the reference, as tightly as the types that store it allow.

    Args:
        narrow: further types that stored what the leaves were computed from.
        factor: of the tolerance.
    """
    want = leaves_by_pair(want)
    for name, leaves in leaves_by_pair(got).items():
        for pair, x in leaves.items():
            error = relative_error(x, want[name][REFERENCE])
            bound = max(TOLERANCES[str(t)] for t in (x.dtype, pair[0], *narrow))
            assert error <= factor * bound, (
                f"{name} of {pair[0]} params, {pair[1]} grads, {x.dtype}"
            )


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_averages_of_narrow_gradients_equal_those_of_wide_ones(case):
    after, total = run(OptimConfig(**SHARED, **case), WIDE)
    factor = EIGENVECTORS if case["name"].startswith("soap") else 1
    check_errors((after, total), (after, total), factor=factor)
    assert "bfloat16" not in {str(x.dtype) for x in jax.tree.leaves(after)}
    narrow = OptimConfig(**SHARED, **case, narrow_buffers=True)
    check_errors(run(narrow, NARROW), (after, total), narrow=["bfloat16"])


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_bfloat16_gradients_are_clipped_in_the_type_of_the_parameters(eps):
    p, grads = values((40, 60))
    clip = lambda g: clip_gradients(1.0, eps).update({"w": g}, optax.EmptyState(), {"w": p32})[0]
    p32 = jnp.asarray(p, jnp.float32)
    got, want = (clip(jnp.asarray(grads[0], t))["w"] for t in (jnp.bfloat16, jnp.float64))
    assert got.dtype == jnp.float32
    assert relative_error(got, want) < 1e-6


def test_noise_of_bfloat16_gradients_is_not_rounded_to_their_type():
    p, grads = values()
    noise, params = heavy_tailed_noise(1.5, 0.5), {"w": jnp.asarray(p, jnp.float64)}
    state = noise.init(params)
    update = jax.jit(noise.update)
    add = lambda t: update({"w": jnp.asarray(grads[0], t)}, state, params)[0]["w"]
    np.testing.assert_array_equal(add(jnp.bfloat16), add(jnp.float64))


@pytest.mark.parametrize("wrapper", ["transport", "lookahead"])
def test_a_wrapper_in_float64_equals_its_definition_to_the_last_digits(wrapper):
    momentum, strength, decay, rate = 0.9, 0.3, 0.95, optax.sgd(1e-2)
    factor = strength * momentum / (1 - momentum) if wrapper == "transport" else strength
    optimizer = {
        "transport": lambda: gradient_transport(rate, momentum, strength),
        "lookahead": lambda: ema_lookahead(rate, strength, decay),
    }[wrapper]()
    z = np.random.default_rng(0).normal(size=(4, 6))
    params, offset, average = jnp.asarray(z), np.zeros_like(z), np.zeros_like(z)
    state = optimizer.init(params)
    for _ in range(60):
        query = z + offset
        updates, state = optimizer.update(params, state, params)  # the gradient of |w|^2 / 2
        params = optax.apply_updates(params, updates)
        after = query - 1e-2 * query if wrapper == "lookahead" else z - 1e-2 * query
        average = decay * average + (1 - decay) * (after - z)
        offset = factor * (average if wrapper == "lookahead" else after - z)
        z = after
        assert relative_error(eval_params(state, params), z) < 3e-15

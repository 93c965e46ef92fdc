"""Optimizers compute averages in their widest type and store them in a type that never changes.

Each case steps one tree, whose leaves are all pairs of a parameter's and a gradient's type. All of
them have the same values, which bfloat16 represents exactly, so that the float64 leaf is the
reference for the others.
"""

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
REFERENCE = "float64", "float64"
SHARED = {"ns_dtype": "float32", "weight_decay": 0.1, "total_steps": STEPS, "clip_norm": 3.0}
LOOKAHEAD = {"name": "accelerated_lmo", "acceleration": "ema_lookahead"}
CASES = [*({"name": name} for name in OPTIMIZERS), LOOKAHEAD]
# Compiles these programs in a quarter of the time; they take milliseconds to run.
QUICK_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


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


def run(cfg, axes, pairs=PAIRS, shape=(4, 6)):
    """Returns (state before, state after, last updates, sum of updates) of steps at fixed params.

    All are trees whose dicts by name are replaced by dicts by pair.
    """
    optimizer = build_optimizer(cfg, {pair: Axes.parse(axes) for pair in map("_".join, pairs)})
    p, g = values(shape)
    params = {f"{a}_{b}": jnp.asarray(p, TYPES[a]) for a, b in pairs}
    grads = {f"{a}_{b}": jnp.asarray(g, TYPES[b]) for a, b in pairs}

    def scan(state, params, grads):
        def advance(carry, grads):
            state, total = carry
            updates, state = optimizer.update(grads, state, params)
            return (state, jax.tree.map(jnp.add, total, updates)), updates

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float64), params)
        return jax.lax.scan(advance, (state, zeros), grads)

    before = optimizer.init(params)
    compiled = jax.jit(scan).lower(before, params, grads).compile(compiler_options=QUICK_COMPILE)
    (after, total), updates = compiled(before, params, grads)
    return before, after, jax.tree.map(lambda u: u[-1], updates), total


def leaves_by_pair(tree):
    """Returns {path without the pair: {pair: leaf}} of the leaves that belong to a parameter."""
    leaves = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        names = [getattr(key, "key", None) for key in path]
        for pair in PAIRS:
            if "_".join(pair) in names:
                rest = tuple(map(str, (key for key, n in zip(path, names, strict=True) if n != "_".join(pair))))
                leaves.setdefault(rest, {})[pair] = x
    return leaves


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)

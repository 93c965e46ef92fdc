import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.crosscheck.reordering import reorder
from jaxtrain.optim.build import build_optimizer

AXES = {"wq": Axes.parse("L|D->HK"), "up": Axes.parse("L|D->F"), "embed": Axes.parse("V|D")}
SIZES = {"L": 2, "D": 64, "H": 4, "K": 16, "F": 176, "V": 32}


def gradients(seed, dtype):
    """Returns gradients with singular values over three decades, as in training."""
    rng = np.random.default_rng(seed)

    def draw(a):
        shape = a.shape(SIZES)
        x = rng.normal(size=a.matrix_shape(shape))
        u, s, v = np.linalg.svd(x, full_matrices=False)
        return jnp.asarray((u * np.geomspace(1, 1e-3, s.shape[-1])) @ v, dtype).reshape(shape)

    return {name: draw(a) for name, a in AXES.items()}


@functools.cache
def moves(name, dtype, ns_dtype, ns_form="torch", per_head=False):
    """Returns the moves of both optimizers after each of 3 steps."""
    cfg = OptimConfig(name=name, ns_dtype=ns_dtype, ns_form=ns_form, per_head=per_head)
    optimizer = build_optimizer(cfg, AXES)
    found = []
    with jax.enable_x64(dtype == "float64"):
        start = jax.tree.map(lambda a: jnp.zeros(a.shape(SIZES), dtype), AXES)
        for opt in (optimizer, reorder(optimizer, AXES)):
            update, params, state = jax.jit(opt.update), start, opt.init(start)
            found.append([])
            for step in range(3):
                updates, state = update(gradients(step, dtype), state, params)
                params = optax.apply_updates(params, updates)
                found[-1].append(jax.tree.map(np.asarray, params))
    return found


def distances(*args, **options):
    pairs = zip(*moves(*args, **options), strict=True)
    off = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(a)
    return [{name: off(a[name], b[name]) for name in AXES} for a, b in pairs]


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"name": "adamw"}])
def test_an_optimizer_that_adds_in_another_order_is_equal_in_float64(options):
    options = {"name": "muon", "dtype": "float64", "ns_dtype": "float64"} | options
    assert max(d for step in distances(**options) for d in step.values()) < 1e-11


def test_the_order_changes_bfloat16_products_by_their_rounding_and_nothing_else():
    steps = distances("muon", "float64", "bfloat16")
    for step in steps:
        assert 1e-4 < max(step.values()) < 3e-2, steps
        assert step["embed"] < 1e-15

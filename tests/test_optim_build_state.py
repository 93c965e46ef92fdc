"""Optimizers' state has the expected size, and degenerate inputs give finite updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.optim.build import build_optimizer, peak_rates

FLOAT32 = 4  # bytes
AXES = {"w": Axes.parse("L|D->F"), "wo": Axes.parse("L|F->D")}
SHAPES = {"w": (2, 64, 96), "wo": (2, 96, 64)}
ACCELERATED = {"name": "accelerated_lmo", "acceleration": "transport"}
LOOKAHEAD = {"name": "accelerated_lmo", "acceleration": "ema_lookahead"}
PLAIN = [
    {"name": name}
    for name in ("muon", "normuon", "soap", "soap_muon", "muon_h", "adam_h", "muown", "adamw")
]
OPTIMIZERS = [*PLAIN, ACCELERATED, LOOKAHEAD]
NARROW = {"narrow_buffers": True}


def ones(shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"name": "muon"}, 4.0),
        ({"name": "muon"} | NARROW, 2.0),
        (ACCELERATED, 8.0),
        (ACCELERATED | NARROW, 4.0),
        (LOOKAHEAD, 8.0),
        (LOOKAHEAD | NARROW, 4.0),
        ({"name": "adamw"}, 8.0),
        ({"name": "soap"}, 8.0 + FLOAT32 * 2 * (64**2 + 96**2) / (64 * 96)),
        ({"name": "soap_muon"} | NARROW, 6.0 + FLOAT32 * 2 * (64**2 + 96**2) / (64 * 96)),
        ({"name": "soap", "precondition_max_side": 80}, 8.0 + FLOAT32 * 2 * 64 / 96),
        ({"name": "normuon"}, 4.0 + FLOAT32 * (96 + 64) / (2 * 64 * 96)),
    ],
    ids=str,
)
def test_the_state_has_the_expected_bytes_per_parameter(options, expected):
    params = ones(SHAPES)
    state = jax.eval_shape(build_optimizer(OptimConfig(**options), AXES).init, params)
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert state_bytes / sum(x.size for x in params.values()) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_the_state_does_not_depend_on_schedule_rate_or_coefficients(options):
    init = lambda **more: build_optimizer(OptimConfig(**options, **more), AXES).init(ones(SHAPES))
    other = init(schedule="cosine", total_steps=77, ns_coefficients="aol4", learning_rate=0.5)
    pairs = zip(jax.tree.leaves(init()), jax.tree.leaves(other), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


DEGENERATE_AXES = {
    "row": Axes.parse("|D->F"),
    "column": Axes.parse("L|D->F"),
    "plain": Axes.parse("H|D->F"),
    "gain": Axes.parse("|D"),
}
DEGENERATE_SHAPES = {"row": (1, 24), "column": (1, 24, 1), "plain": (2, 12, 16), "gain": (12,)}


def gradients():
    """Yields trees of gradients: zero, constant, random, tiny, huge and negative."""
    ones = {name: np.ones(shape, np.float32) for name, shape in DEGENERATE_SHAPES.items()}
    rng = np.random.default_rng(0)
    full = {k: rng.normal(size=x.shape).astype(np.float32) for k, x in ones.items()}
    scaled = lambda tree, size: {k: np.float32(size) * x for k, x in tree.items()}
    yield from (scaled(ones, 0), ones, full, scaled(full, 1e-30), scaled(full, 1e30))
    yield scaled(ones, -1e30)


@functools.cache
def updater(options):
    """Returns init, update and the peak rates; one program serves all rates."""
    cfg = OptimConfig(weight_decay=0.1, warmup_steps=0, **dict(options))
    optimizer = build_optimizer(cfg, DEGENERATE_AXES)
    update = jax.jit(lambda g, s, p, rates: optimizer.update(g, s, p, rates=rates))
    return jax.jit(optimizer.init), update, peak_rates(cfg, DEGENERATE_AXES)


# Without clipping, optimizers that square their gradient would exceed the range of float32.
UNCLIPPED = [{"name": "muon"}, {"name": "normuon"}, ACCELERATED]


@pytest.mark.parametrize(
    ("options", "clip_norm"),
    [(options, 1.0) for options in OPTIMIZERS] + [(options, 0.0) for options in UNCLIPPED],
    ids=str,
)
def test_degenerate_shapes_and_gradients_give_finite_updates(options, clip_norm):
    init, update, rates = updater((*options.items(), ("clip_norm", clip_norm)))
    params = ones(DEGENERATE_SHAPES)
    state = init(params)
    for grads in gradients():
        if clip_norm == 0:  # Adam squares the vector's gradient, which would overflow
            grads["gain"] = np.clip(grads["gain"], -1e15, 1e15)
        updates, state = update(grads, state, params, rates)
        params = optax.apply_updates(params, updates)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_at_a_rate_of_zero_neither_query_point_nor_iterate_moves(options):
    init, update, rates = updater((*options.items(), ("clip_norm", 1.0)))
    start = params = ones(DEGENERATE_SHAPES)
    state = init(params)
    for grads in list(gradients())[1:3]:
        updates, state = update(grads, state, params, dict.fromkeys(rates, 0.0))
        params = optax.apply_updates(params, updates)
    for tree in (params, eval_params(state, params)):
        for key, x in start.items():  # Muown computes rows again from length and direction
            ulps = 4 if options["name"] == "muown" else 0
            np.testing.assert_array_max_ulp(np.asarray(tree[key]), np.asarray(x), ulps)

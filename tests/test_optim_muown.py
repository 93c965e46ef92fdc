"""Muown equals a twin in NumPy; rows keep the lengths that its state says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizer_twins import (
    AXES,
    OPTIONS,
    Muown,
    assert_histories_agree,
    decoupled,
    draw,
    train_ours,
    train_twin,
)

from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.acceleration import ema_lookahead, gradient_transport
from jaxtrain.optim.build import build_optimizer

MUOWN = {"name": "muown", "scale": "match_rms", "weight_decay": 1.0}
INPUTS = {"w_in": (1,), "w_out": (1,)}  # dims of the inputs of [L,D,H,K] and [L,F,D]


@pytest.mark.parametrize("target", [0.0, 2.5])
def test_muown_equals_its_twin_over_50_steps(target):
    ours, _ = train_ours(**MUOWN, final_radius=target)
    apply = lambda p, twin, rate, decay: twin.apply(p, rate)
    expected = train_twin(lambda: Muown(target), apply, decay=1.0, rest_apply=decoupled)
    assert_histories_agree([params for params, _ in ours], expected)


def test_rows_of_zeros_start_to_move():
    optimizer = build_optimizer(OptimConfig(**OPTIONS | MUOWN), AXES)
    params = draw(0)
    params["w_out"][0] = 0
    params = jax.tree.map(jnp.asarray, params)
    updates: Any = jax.jit(optimizer.update)(draw(1), optimizer.init(params), params)[0]
    lengths = np.linalg.norm(np.asarray(updates["w_out"][0]), axis=0)
    np.testing.assert_allclose(lengths, 0.33**0.5, rtol=0.1)


@pytest.mark.parametrize(
    "wrap",
    [lambda o: gradient_transport(o, 0.95, 0.25), lambda o: ema_lookahead(o, 0.6)],
    ids=["transport", "ema_lookahead"],
)
def test_under_acceleration_the_iterates_rows_have_the_lengths_of_the_state(wrap):
    cfg = OptimConfig(**OPTIONS | MUOWN)
    trained: Any = train_ours(wrap(build_optimizer(cfg, AXES)))
    history, state = trained
    matrices = state.inner[-1].inner_states["matrices"].inner_state
    for name, dims in INPUTS.items():
        rows = np.sqrt((np.asarray(history[-1][1][name]) ** 2).sum(dims, keepdims=True))
        np.testing.assert_allclose(rows, np.abs(matrices.length[name]), rtol=1e-12)

import functools

import jax
import numpy as np
import pytest

from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.training.diagnostic_step import compile_diagnosis, count_parts
from jaxtrain.training.run import build_run
from jaxtrain.training.step import init_state

B, T = 16, 16
LMO = {"name": "accelerated_lmo", "rest": "lmo"}  # which reports the most


@functools.cache
def diagnose(mesh=(1, 1, 1), **optim):
    """Returns (metrics, state before, state after) of one diagnosis."""
    config = debug.get_config()
    config.model.update(L=1, D=16, H=2, G=2, K=8, F=32, attention="reference")
    config.mesh.replica, config.mesh.fsdp, config.mesh.tensor = mesh
    config.update(data=dict(batch=B, seq_len=T))
    config.optim.update(ns_dtype="float32", warmup_steps=0, **optim)
    run = build_run(config_lib.freeze(config), jax.devices()[: int(np.prod(mesh))])
    state = init_state(run.model, run.optimizer, run.mesh, 0)
    before = jax.device_get(state)
    tokens = np.random.default_rng(0).integers(0, 256, (B, T + 1)).astype(np.int32)
    batch = {"tokens": jax.device_put(tokens, batch_sharding(run.mesh))}
    metrics = jax.device_get(compile_diagnosis(run)(state, batch, run.rates()))
    return metrics, before, jax.device_get(state)


def test_a_diagnosis_changes_nothing():
    _, before, after = diagnose(**LMO)
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("mesh", [(2, 1, 2)])
def test_a_diagnosis_is_the_same_on_every_mesh(mesh):
    one, split = diagnose(**LMO)[0], diagnose(mesh, **LMO)[0]
    assert one.keys() == split.keys()
    for name, value in one.items():
        np.testing.assert_allclose(split[name], value, rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("optim", [LMO, {"name": "adamw"}])
def test_the_diagnosis_reports_every_group_by_name(optim):
    metrics = diagnose(**optim)[0]
    groups = {name.split("/")[1] for name in metrics}
    own = {"embedding", "head", "vector"} if "rest" in optim else {"rest"}
    assert groups == {"all", "matrices"} | own
    assert all(np.isfinite(x) for name, x in metrics.items() if "noise_scale" not in name)
    dual = {name.split("/")[1] for name in metrics if name.endswith("dual_norm")}
    assert dual == ({"matrices"} | own if "rest" in optim else set())


def test_no_microbatch_is_larger_than_the_training_steps():
    mesh = build_run(config_lib.freeze(debug.get_config()), jax.devices()[:1]).mesh
    assert count_parts(64, 1, mesh) == 8
    assert count_parts(64, 32, mesh) == 32
    assert count_parts(6, 1, mesh) == 6
    with pytest.raises(ValueError, match="got data.batch=1. Set --data.batch=2, or"):
        count_parts(1, 1, mesh)

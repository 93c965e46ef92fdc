"""Training with the fused kernels, interpreted, equals training with their references."""

import jax
import numpy as np
import pytest

from configs import debug
from jaxtrain.config.train_config import freeze
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import init_state
from pallas_kernels.kernel_choice import OPS


def losses(interpret, mesh=(1, 2, 2), steps=3):
    """Trains one layer with a document mask, with heads and rows sharded over several devices."""
    config = debug.get_config()
    config.kernels.interpret, config.data.document_mask = interpret, True
    config.model.update(
        L=1, H=2, G=2, K=16, F=32, mlp="gelu"
    )  # all matrices 32x32: one iteration of Muon's
    config.optim.ns_steps, config.data.seq_len = 1, 16
    config.mesh.replica, config.mesh.fsdp, config.mesh.tensor = mesh
    run = build_run(freeze(config), jax.devices()[: int(np.prod(mesh))])
    fused = {op for op, route in run.routes.items() if "interpret" in route.implementation}
    assert fused == (set(OPS) if interpret else set())
    state, step, out = init_state(run.model, run.optimizer, run.mesh, 0), compile_step(run), []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        docs = np.cumsum(rng.random((8, 17)) < 0.1, 1, dtype=np.int32)
        batch = {"tokens": rng.integers(0, 256, (8, 17), np.int32), "docs": docs}
        batch["weights"] = np.ones((8, 16), np.float32)
        batch = jax.device_put(batch, batch_sharding(run.mesh))
        state, scalars = step(state, batch, run.rates())
        out.append(float(scalars["train/loss_nats"]))
    return np.array(out)


@pytest.mark.long
def test_losses_with_fused_kernels_equal_those_with_references():
    fused, plain = losses(True), losses(False)
    np.testing.assert_allclose(fused, plain, atol=1e-4)
    assert fused[0] != fused[-1]

"""Training with the fused kernels, interpreted, equals training with their references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GPT2

from configs import debug
from jaxtrain.config.train_config import KernelsConfig, MeshConfig, freeze
from jaxtrain.distributed.mesh import batch_sharding, build_mesh
from jaxtrain.model.transformer import build_model
from jaxtrain.ops.routes import choose_routes
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


@pytest.mark.parametrize("sizes", [None, (1, 2, 2)], ids=["one device", "rows and F are split"])
@pytest.mark.parametrize("op", ["gelu", "norm"])
def test_a_gpt_2_with_a_fused_op_equals_one_with_xlas(op, sizes):
    """The norm's kernel adds attention's output bias. GELU's kernel adds its input's bias."""
    mesh = sizes and build_mesh(MeshConfig(*sizes), jax.devices()[:4])
    plain = choose_routes(GPT2, False, "cpu", False)
    interpreted = choose_routes(GPT2, False, "cpu", False, KernelsConfig(interpret=True))
    models = [build_model(GPT2, plain | {op: x[op]}, mesh) for x in (plain, interpreted)]
    params = jax.tree.map(lambda x: x + 0.1, models[0].init(jax.random.key(0)))  # biases, too
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 96)

    def compute(model):
        @jax.jit
        def run(params):
            hidden, pullback = jax.vjp(lambda params: model.apply(params, tokens), params)
            return hidden, *pullback(jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape))

        return run.lower(params), run(params)

    (plain_text, want), (fused_text, got) = map(compute, models)
    assert plain_text.as_text() != fused_text.as_text()
    for x, x_want in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # The gradient of the keys' biases is zero, so it is only rounding errors.
        np.testing.assert_allclose(x, x_want, atol=1e-5 * max(np.abs(x_want).max(), 1.0))

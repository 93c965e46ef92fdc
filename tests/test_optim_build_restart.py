"""Every optimizer continues from a checkpoint as if it had not been interrupted."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxtrain.axes import Axes
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config.train_config import MeshConfig, OptimConfig
from jaxtrain.distributed.mesh import build_mesh, param_sharding
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.optim.build import build_optimizer, state_shardings

AXES = {"wq": Axes.parse("L|D->HK"), "w_down": Axes.parse("L|F->D"), "gain": Axes.parse("L|D")}
SIZES = {"L": 4, "D": 16, "H": 2, "K": 8, "F": 24}
ACCELERATED = {"name": "accelerated_lmo"}
OPTIMIZERS = {
    "normuon": {"name": "normuon"},
    "muon_h": {"name": "muon_h"},
    "muown": {"name": "muown", "final_radius": 2.0},
    "muon_h_per_head": {"name": "muon_h", "per_head": True},
    "transport": ACCELERATED,
    "transport_narrow": ACCELERATED | {"narrow_buffers": True},
    "soap": {"name": "soap", "precondition_every": 3},
    # averages from step 3 on, and is interrupted at step 4
    "transport_tail": ACCELERATED | {"tail_average": 0.85, "tail_horizon": 3, "tail_weight": 0.6},
    "lookahead": ACCELERATED | {"acceleration": "ema_lookahead", "strength": 0.6},
}
ONE, COPIES, SPLIT = (1, 1, 1), (2, 1, 1), (1, 2, 2)
# Every optimizer restarts on its own mesh and on another one; SOAP, whose matrices have owners, on
# both others.
OVER_COPIES = ("muon_h_per_head", "transport", "soap", "lookahead")
OVER_SPLIT = ("normuon", "muon_h", "muown", "transport_narrow", "soap", "transport_tail")


def draw(seed):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=a.shape(SIZES)).astype(np.float32) for k, a in AXES.items()}


@functools.cache
def build(name, sizes):
    """Returns (optimizer, jitted advance, shardings of (params, state)) on a mesh."""
    mesh = build_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    cfg = OptimConfig(**OPTIMIZERS[name], ns_dtype="float32", total_steps=20, warmup_steps=0)
    optimizer = build_optimizer(cfg, AXES, mesh)
    params = {k: param_sharding(a, a.shape(SIZES), mesh) for k, a in AXES.items()}
    shardings = params, state_shardings(optimizer, AXES, draw(0), mesh)

    def advance(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return optimizer, jax.jit(advance, out_shardings=shardings), shardings


def train(name, sizes, steps, state=None):
    """Returns (params, optimizer state) after `steps`, from the start or a restored state."""
    optimizer, advance, shardings = build(name, sizes)
    state = state or jax.device_put((draw(0), optimizer.init(draw(0))), shardings)
    for step in steps:
        state = advance(*state, draw(100 + step))
    return state


def restored(name, sizes, folder):
    optimizer, _, shardings = build(name, sizes)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda: (draw(0), optimizer.init(draw(0)))),
        shardings,
    )
    with Checkpoints(folder, 1) as checkpoints:
        return tuple(checkpoints.restore(abstract).state)


@functools.cache
def uninterrupted(name):
    return train(name, ONE, range(8))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [(name, ONE) for name in OPTIMIZERS]
    + [(name, COPIES) for name in OVER_COPIES]
    + [(name, SPLIT) for name in OVER_SPLIT],
)
def test_a_restart_is_bitwise_equal_or_on_another_mesh_equal_up_to_rounding(name, sizes, tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(4, train(name, ONE, range(4)), {})
    params, state = train(name, sizes, range(4, 8), restored(name, sizes, tmp_path))
    expected_params, expected_state = uninterrupted(name)
    ours, theirs = eval_params(state, params), eval_params(expected_state, expected_params)
    for key, x in ours.items():
        if sizes == ONE:
            np.testing.assert_array_equal(x, theirs[key])
        else:  # bfloat16 buffers may differ in the last bit
            tolerance = 1e-3 if "narrow" in name else 1e-5
            np.testing.assert_allclose(x, theirs[key], rtol=tolerance, atol=tolerance)

"""Layouts of parameters whose axes use letters that the trainer's model does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import MeshConfig, OptimConfig
from jaxtrain.distributed.mesh import (
    batch_sharding,
    build_mesh,
    check_batch,
    moment_spec,
    param_sharding,
    param_spec,
)
from jaxtrain.optim.build import build_optimizer, state_shardings

AXES = {
    "square": "L|D->D",
    "conv": "|HWI->D",
    "inner": "|CF->DK",
    "named": (("layers",), ("in",), ("out",)),
    "outputs_first": "|FQ<-D",
}
SHAPES = {
    "square": (2, 8, 8),
    "conv": (2, 3, 4, 8),
    "inner": (3, 4, 8, 2),
    "named": (2, 8, 6),
    "outputs_first": (4, 2, 8),
}
SPECS = {
    "square": P(None, "fsdp", None),
    "conv": P("tensor", None, None, "fsdp"),
    "inner": P(None, None, "fsdp", None),
    "named": P(None, None, None),
    "outputs_first": P("tensor", None, "fsdp"),
}


@pytest.mark.parametrize("name", AXES)
def test_dims_without_a_mesh_axis_repeats_and_inner_dims_stay_whole(name):
    mesh = build_mesh(MeshConfig(1, 4, 2))
    assert param_spec(Axes.parse(AXES[name]), SHAPES[name], mesh) == SPECS[name]


@pytest.mark.parametrize(
    "mesh",
    [jax.make_mesh((8,), ("data",)), None, NamedSharding(build_mesh(MeshConfig()), P())],
    ids=lambda mesh: type(mesh).__name__,
)
def test_a_mesh_without_our_axes_is_refused_with_the_function_that_builds_one(mesh):
    axes, shape = Axes.parse(AXES["square"]), SHAPES["square"]
    for use in (
        lambda: batch_sharding(mesh),
        lambda: check_batch(8, 1, mesh),
        lambda: param_spec(axes, shape, mesh),
        lambda: moment_spec(axes, shape, mesh),
    ):
        with pytest.raises(ValueError, match="axes replica, fsdp, tensor; got .* Use build_mesh"):
            use()


def test_an_update_on_a_mesh_equals_that_of_one_device_for_any_letters():
    axes = {name: Axes.parse(AXES[name]) for name in ("square", "conv", "inner")}
    rng, cfg = np.random.default_rng(0), OptimConfig(warmup_steps=0, ns_dtype="float32")
    params = {name: jnp.asarray(rng.normal(size=SHAPES[name]), jnp.float32) for name in axes}
    mesh = build_mesh(MeshConfig(1, 4, 2))
    whole, split = build_optimizer(cfg, axes), build_optimizer(cfg, axes, mesh)
    shardings = {name: param_sharding(a, SHAPES[name], mesh) for name, a in axes.items()}
    state = jax.device_put(split.init(params), state_shardings(split, axes, params, mesh))
    ours, _ = jax.jit(split.update)(*(jax.device_put(params, shardings), state, params))
    theirs, _ = jax.jit(whole.update)(params, whole.init(params), params)
    for name, u in theirs.items():
        np.testing.assert_allclose(ours[name], u, atol=2e-7, err_msg=name)

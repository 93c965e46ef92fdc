"""A state of many dtypes and containers, and functions that save, compare and damage it."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.checkpoint.integrity import record_hash
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config.train_config import MeshConfig
from jaxtrain.distributed.mesh import build_mesh

ONE, FSDP, MIXED = MeshConfig(1, 1, 1), MeshConfig(1, 8, 1), MeshConfig(1, 2, 4)


def mesh_of(cfg):
    return build_mesh(cfg, jax.devices()[: cfg.replica * cfg.fsdp * cfg.tensor])


def build_state(cfg=ONE, seed=0):
    """Returns a new tree of cached arrays."""
    return jax.tree.map(lambda x: x, _build_state(cfg, seed))


@functools.cache
def _build_state(cfg, seed):
    """Returns parameters of three float types and the state of a masked, chained optimizer."""
    mesh = mesh_of(cfg)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w": jax.random.normal(keys[0], (16, 32)),
        "layers": {"v": jax.random.normal(keys[1], (8, 24), jnp.bfloat16)},
        "b": jax.random.normal(keys[2], (5,), jnp.float16),
    }
    masked = optax.masked(
        optax.sgd(0.1, momentum=0.9), {"w": False, "layers": {"v": True}, "b": True}
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), masked, optax.adam(1e-3))
    opt = optimizer.update(params, optimizer.init(params), params)[1]
    state = {"params": params, "opt": opt, "step": jnp.int32(seed), "bad": jnp.bool_(True)}
    place = lambda x: NamedSharding(mesh, P("fsdp", "tensor") if x.ndim == 2 else P())
    return jax.tree.map(lambda x: jax.device_put(x, place(x)), state)


def abstract(state):
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(struct, state)


def bits(state):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert bits(a) == bits(b)


def saved(folder, steps, cfg=ONE, keep_last=9):
    """Saves build_state(seed=step) at each step; returns a function: step -> its state."""
    with Checkpoints(folder, keep_last) as checkpoints:
        for step in steps:
            checkpoints.save(step, build_state(cfg, step), {"next": step})
            checkpoints.wait()
    return lambda step: build_state(cfg, step)


def data_files(step_folder):
    return sorted(p for p in (step_folder / "state").glob("**/d/*") if p.is_file())


def truncate(step_folder):
    for file in data_files(step_folder):
        os.truncate(file, file.stat().st_size // 2)


def rewrite_record(step_folder, **fields):
    """Changes fields of the record and its sha256, as another program could."""
    file = step_folder / "record/metadata"
    record = json.loads(file.read_text()) | fields
    file.write_text(json.dumps(record | {"sha256": record_hash(record)}))

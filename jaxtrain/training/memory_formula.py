"""Estimates a step's peak memory by a formula, in a second and without the GPU compiler.

Parameters and optimizer state are exact, as their shapes are known and so is how they are sharded.
The rest is a sum of three parts: what each layer saves for its backward pass, the working set of
one layer, and a workspace that does not grow with the tokens. The three constants of the workspace
were fitted on 2026-11-25 to 34 compiled steps of the shipped configs (1 and 8 devices, 1,024 to
131,072 tokens per device, every remat), whose layers were scanned. A scan copies what it stores, so
layers that are unrolled save half as much: what they save was counted by hand, one number for each
input of an operation whose backward needs it. It agrees with 21 steps compiled on 2026-11-28 (A40,
H100, H200, jax 0.10.2 and 0.11.2; tests/test_training_memory_formula.py). All errors are at most
0.7 of the bound below.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxtrain.config.train_config import ModelConfig, TrainConfig
from jaxtrain.distributed.mesh import AXES, mesh_sizes
from jaxtrain.model.transformer import Model, build_model
from jaxtrain.ops.routes import choose_routes
from jaxtrain.optim.build import build_optimizer, state_shardings

# The estimate is off by at most the larger of these two.
RELATIVE_ERROR, ABSOLUTE_ERROR_BYTES = 0.1, 2**29
# Fitted bytes of workspace per byte of ...
PER_PARAMETER = 0.65  # ... a device's share of the parameters: bfloat16 copies and gradients
PER_HEAD = 3.0  # ... the whole head in float32: gathered weights, gradient, accumulated gradient
PER_LOGITS = 0.25  # ... one chunk of logits in float32


class MemoryEstimate(NamedTuple):
    """Bytes on one device."""

    state: float
    gradients: float
    activations: float  # and workspace

    @property
    def peak(self) -> float:
        return self.state + self.gradients + self.activations


def is_unrolled(m: ModelConfig) -> bool:
    """Returns whether a GPU runs all layers of a model without a loop."""
    layers = choose_routes(dataclasses.replace(m, attention="auto"), False, "gpu", False)["layers"]
    return int(layers.implementation.removeprefix("unroll=")) >= m.L


def _saved_per_token(m: ModelConfig, tensor: int) -> float:
    """Returns how many numbers a layer saves for its backward pass for each token.

    Args:
        tensor: devices that the heads and the MLP's width are split over.
    """
    q_width, kv_width = m.H * m.K / tensor, 2 * m.G * m.K / tensor
    ffn_width = (3 if m.has_gated_mlp else 2) * m.F / tensor
    norms = 4 if m.norm_place == "both" else 2
    if m.remat == "none" and is_unrolled(m):
        # What norms read and the layer's first products read; query, key, value and attention's
        # result; what the MLP's products read and write.
        before_qk_norm = (q_width + kv_width / 2) if m.qk_norm else 0
        return (norms + 2) * m.D + 2 * q_width + kv_width + before_qk_norm + ffn_width
    if m.remat == "none":
        ffn_factor = 2.5 if m.has_gated_mlp else 3.5
        return (norms + 4) * m.D + 2 * (q_width + kv_width) + ffn_factor * ffn_width
    return {
        "dots": 2 * m.D + 2 * q_width + kv_width + ffn_width - m.F / tensor,
        "attention": m.D + q_width,
        "full": m.D,
    }[m.remat]


def _tree_bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _optimizer_bytes(optimizer: Any, model: Model, mesh: Any) -> int:
    """Returns the bytes of the optimizer's state on one device.

    Not all of it is split: a device has whole matrices of SOAP's state (optim/owners.py).
    """
    shardings = state_shardings(optimizer, model.axes, model.shapes, mesh)
    state = jax.eval_shape(optimizer.init, model.shapes)
    part = lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(part, state, shardings)))


def estimate_memory(cfg: TrainConfig, devices: int) -> MemoryEstimate:
    """Estimates the memory of one device, on the mesh that cfg.mesh makes of so many devices.

    Attention is assumed not to store its scores.

    Raises:
        ValueError: cfg.mesh does not fit the devices, or model.dtype or model.remat is "auto": see
            ops/precision.py and remat.py.
    """
    m, data = cfg.model, cfg.data
    for field in ("dtype", "remat"):
        if getattr(m, field) == "auto":
            m.fail(field, "must be resolved before the memory is estimated")
    replica, fsdp, tensor = mesh_sizes(cfg.mesh, devices)
    mesh: Any = AbstractMesh((replica, fsdp, tensor), AXES)  # a Mesh for all that is asked of it
    # Shapes do not depend on which implementation of an op runs, so the CPU's routes will do.
    shape_cfg = dataclasses.replace(m, attention="auto")
    model = build_model(shape_cfg, choose_routes(shape_cfg, False, "cpu", False))
    optimizer = build_optimizer(cfg.optim, model.axes)
    parameter_bytes = _tree_bytes(model.shapes)
    own_bytes = parameter_bytes / (fsdp * tensor)
    rows = data.batch / cfg.accumulation / (replica * fsdp)
    chunk_positions = min(cfg.loss.chunk_bytes / (4 * rows * m.V), math.ceil(data.seq_len / 4))
    workspace_bytes = (
        PER_PARAMETER * own_bytes
        + PER_HEAD * 4 * m.V * m.D
        + PER_LOGITS * 4 * rows * chunk_positions * m.V
    )
    # Numbers per token that are live at once while one layer computes.
    working_set_per_token = 4 * m.D + 1.6 * (3 if m.has_gated_mlp else 2) * m.F / tensor
    numbers_per_token = m.L * _saved_per_token(m, tensor) + working_set_per_token
    activation_bytes = jnp.dtype(m.dtype).itemsize * rows * data.seq_len * numbers_per_token
    return MemoryEstimate(
        own_bytes + _optimizer_bytes(optimizer, model, mesh),
        own_bytes,
        activation_bytes + workspace_bytes,
    )

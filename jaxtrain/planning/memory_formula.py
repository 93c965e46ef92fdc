"""Estimates a step's peak memory by a formula, in a second and without the GPU compiler.

Parameters and optimizer state are exact, as their shapes are known and they are sharded over all
devices. The rest is a sum of three parts: what each layer saves for its backward pass, the working
set of one layer, and a workspace that does not grow with the tokens. The three constants of the
workspace were fitted on 2026-11-25 to 34 compiled steps of the shipped configs (1 and 8 devices,
1,024 to 131,072 tokens per device, every remat). Their errors are at most 0.7 of the bound below.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from jaxtrain.config.train_config import ModelConfig, TrainConfig
from jaxtrain.distributed.mesh import AXES
from jaxtrain.model.transformer import Model, build_model
from jaxtrain.ops.routes import choose_routes
from jaxtrain.optim.build import build_optimizer, state_shardings

# The estimate is off by at most the larger of these two.
RELATIVE_ERROR, ABSOLUTE_ERROR_BYTES = 0.1, 2**29
# Fitted bytes of workspace per byte of ...
PER_PARAMETER = 0.65  # ... a device's share of the parameters: bfloat16 copies and gradients
PER_HEAD = 3.0  # ... the whole head in float32: gathered weights, gradient, accumulated gradient
PER_LOGITS = 0.25  # ... one chunk of logits in float32
ACTIVATION_BYTES = 2  # bfloat16


class MemoryEstimate(NamedTuple):
    """Bytes on one device."""

    state: float
    gradients: float
    activations: float  # and workspace

    @property
    def peak(self) -> float:
        return self.state + self.gradients + self.activations


def _saved_per_token(m: ModelConfig) -> float:
    """Returns how many numbers a layer saves for its backward pass for each token."""
    q_width, kv_width = m.H * m.K, 2 * m.G * m.K
    ffn_width, ffn_factor = (3 * m.F, 2.5) if m.has_gated_mlp else (2 * m.F, 3.5)
    residual_width = (8 if m.norm_place == "both" else 6) * m.D  # both: two more norms' inputs
    return {
        "none": residual_width + 2 * (q_width + kv_width) + ffn_factor * ffn_width,
        "dots": 2 * m.D + 2 * q_width + kv_width + ffn_width - m.F,
        "attention": m.D + q_width,
        "full": m.D,
    }[m.remat]


def _tree_bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _optimizer_bytes(optimizer: Any, model: Model, devices: int) -> int:
    """Returns the bytes of the optimizer's state on one device.

    Not all of it is split: a device has whole matrices of SOAP's state (optim/owners.py).
    """
    mesh: Any = AbstractMesh((1, devices, 1), AXES)  # a Mesh for all that is asked of it
    shardings = state_shardings(optimizer, model.axes, model.shapes, mesh)
    state = jax.eval_shape(optimizer.init, model.shapes)
    part = lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(part, state, shardings)))


def estimate_memory(cfg: TrainConfig, devices: int) -> MemoryEstimate:
    """Estimates the memory of one device; parameters are sharded over all (mesh.fsdp=-1)."""
    m, data = cfg.model, cfg.data
    # Shapes do not depend on which implementation of an op runs, so the CPU's routes will do.
    model = build_model(m, choose_routes(m, False, "cpu", False))
    optimizer = build_optimizer(cfg.optim, model.axes)
    parameter_bytes = _tree_bytes(model.shapes)
    optimizer_bytes = _optimizer_bytes(optimizer, model, devices)
    rows = data.batch / cfg.accumulation / devices
    chunk_positions = min(cfg.loss.chunk_bytes / (4 * rows * m.V), math.ceil(data.seq_len / 4))
    workspace_bytes = (
        PER_PARAMETER * parameter_bytes / devices
        + PER_HEAD * 4 * m.V * m.D
        + PER_LOGITS * 4 * rows * chunk_positions * m.V
    )
    # Numbers per token that are live at once while one layer computes.
    working_set_per_token = 4 * m.D + 1.6 * (3 if m.has_gated_mlp else 2) * m.F
    numbers_per_token = m.L * _saved_per_token(m) + working_set_per_token
    activation_bytes = ACTIVATION_BYTES * rows * data.seq_len * numbers_per_token
    return MemoryEstimate(
        parameter_bytes / devices + optimizer_bytes,
        parameter_bytes / devices,
        activation_bytes + workspace_bytes,
    )

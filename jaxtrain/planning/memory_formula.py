"""Peak memory of a step by formula, in a second and with no compiler for GPUs.

State is exact: the shapes that the optimizer makes, shared by all devices. The rest is a sum of
what each layer keeps for its backward, what one layer holds at once, and what does not grow with
the tokens. Its three factors were fitted to 34 compiled steps of the shipped configs, of 1 and 8
devices, 1,024 to 131,072 tokens each and every remat, on 2026-11-25; it misses none of them by more
than 0.7 of the error that is stated here.
"""

import math
from typing import NamedTuple

import jax

from jaxtrain.model.transformer import build_model
from jaxtrain.ops.routes import choose_routes
from jaxtrain.optim.build import build_optimizer

RELATIVE, ABSOLUTE_BYTES = 0.1, 2**29  # the error: at most the larger of the two
PER_PARAMETER = 0.65  # bytes of workspace for one of a device's share: narrow copies and gradients
PER_HEAD = 3.0  # of the whole head in float32: gathered, its gradient, its sum
PER_LOGITS = 0.25  # of a chunk's in float32
NARROW = 2  # bytes of an activation


class Estimate(NamedTuple):
    """Bytes on one device."""

    state: float
    gradients: float
    activations: float  # and workspace

    @property
    def peak(self) -> float:
        return self.state + self.gradients + self.activations


def _kept(m) -> float:
    """Numbers that a layer keeps of a token for its backward, by the remat of a ModelConfig."""
    heads, shared = m.H * m.K, 2 * m.G * m.K
    hidden = (3 if m.mlp == "swiglu" else 2) * m.F
    return {
        "none": 6 * m.D + 2 * (heads + shared) + (2.5 if m.mlp == "swiglu" else 3.5) * hidden,
        "dots": 2 * m.D + heads + shared + hidden - m.F,
        "attention": m.D + heads,
        "full": m.D,
    }[m.remat]


def _held(m) -> float:
    """Numbers of a token that the layer at work holds at once, forward and backward."""
    return 4 * m.D + 1.6 * (3 if m.mlp == "swiglu" else 2) * m.F


def _bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def estimate(cfg, devices: int) -> Estimate:
    """Of a TrainConfig whose state is shared by all devices (mesh.fsdp=-1)."""
    m, data = cfg.model, cfg.data
    model = build_model(m, choose_routes(m, False, "cpu", False))
    optimizer = build_optimizer(cfg.optim, model.axes)
    parameters = _bytes(model.shapes)
    state = parameters + _bytes(jax.eval_shape(optimizer.init, model.shapes))
    rows = data.batch / cfg.accumulation / devices
    steps = min(cfg.loss.chunk_bytes / (4 * rows * m.V), math.ceil(data.seq_len / 4))
    workspace = (
        PER_PARAMETER * parameters / devices
        + PER_HEAD * 4 * m.V * m.D
        + PER_LOGITS * 4 * rows * steps * m.V
    )
    tokens = rows * data.seq_len
    kept = NARROW * tokens * (m.L * _kept(m) + _held(m))
    return Estimate(state / devices, parameters / devices, kept + workspace)

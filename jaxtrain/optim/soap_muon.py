"""SOAP-Muon: momentum divided as in SOAP, then orthogonalised as in Muon.

The Nesterov momentum U of a matrix is rotated by the bases of the gradient's factors, divided by
the root of the average of its own rotated squares, rotated back, and then replaced by the nearest
semi-orthogonal matrix. In the first step, before there are bases, it is Muon's.

Record #44 of modded-nanogpt's track 3 computes this for query, key, value and MLP matrices. It adds
what is not part of the optimizer here: the gate that mixes in raw momentum for attn.proj, the floor
of the update's size relative to the weight, half of the outward radial part with the rescaling to
the intended norm, the schedule of the momentum, and a look-ahead. Its rescaling of the divided
momentum to the length of the raw one is left out, as Newton-Schulz ignores lengths.

Sources: https://nikhilvyas.github.io/SOAP_Muon.pdf; KellerJordan/modded-nanogpt,
records/track_3_optimization/results/20260609_soap_f1_auxb2_clean/train_gpt_clean_SOTA.py
"""

from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import AxesTree
from jaxtrain.ops.routes import Route
from jaxtrain.optim import Hyperparameter, check_decay, check_number
from jaxtrain.optim.complete import AdamW, Rate, View, complete_optimizer
from jaxtrain.optim.default_axes import build_for_matrices
from jaxtrain.optim.lmo import build_unit_step
from jaxtrain.optim.muon import build_newton_schulz
from jaxtrain.optim.newton_schulz import NewtonSchulz
from jaxtrain.optim.precision import average
from jaxtrain.optim.preconditioner import (
    MAX_SIDE,
    precondition,
    preconditioner_options,
    rotate,
    rotate_back,
)

EPS = 2e-14  # the record's 1e-8, for a mean loss: its loss is a sum over 524,288 tokens


def scale_by_soap_muon(
    axes: Any = None,
    newton_schulz: str | NewtonSchulz = "jordan",
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    decay: Hyperparameter = 0.9,
    eps: Hyperparameter = EPS,
    every: Hyperparameter = 1,
    max_side: int = MAX_SIDE,
    buffer_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    chunk_bytes: int | None = None,
    **options,
) -> optax.GradientTransformationExtraArgs:
    """Builds SOAP-Muon's direction; the defaults are those of record #44, but for Newton-Schulz.

    The record iterates 12 times with the coefficients 2, -1.5 and 0.5. Every parameter must be a
    matrix: `soap_muon` is the optimizer of a whole model.

    Args:
        axes: see `resolve_axes`.
        newton_schulz: a key of COEFFICIENTS, or the iteration itself.
        momentum: decay of the averaged gradient, in [0, 1).
        nesterov: averages the gradient into the momentum a second time before the step.
        decay: decay of the averaged square and of the factors, in [0, 1).
        eps: floor of the root of the averaged square.
        every: steps from one refresh of the bases to the next.
        max_side, buffer_dtype, mesh, chunk_bytes: see `precondition`.
        options: scale, dtype and per_head of `build_unit_step`.

    Raises:
        ValueError: an argument is out of range, or (at init) a parameter is no matrix.
    """
    check_decay(momentum, "momentum", "optim.momentum")
    check_number(eps, "eps")
    if not callable(newton_schulz):
        newton_schulz = NewtonSchulz(newton_schulz)
    unit_step = build_unit_step(newton_schulz, **options)

    def direction(g_XIO, state, progress):
        mean_XIO = progress.average(momentum, state.momentum, g_XIO)
        blend = average(momentum, mean_XIO, g_XIO, g_XIO.dtype) if nesterov else mean_XIO
        rotated_XIO = rotate(blend.astype(g_XIO.dtype), state)
        square_XIO = progress.average(decay, state.square, rotated_XIO**2, progress.has_bases)
        root_XIO = jnp.maximum(jnp.sqrt(square_XIO), eps)
        divided_XIO = rotate_back(rotated_XIO / jnp.where(progress.has_bases, root_XIO, 1), state)
        return divided_XIO, state._replace(momentum=mean_XIO, square=square_XIO)

    def build(axes):
        shared = max_side, buffer_dtype, mesh, unit_step, chunk_bytes
        return precondition(axes, direction, decay, every, *shared)

    return build_for_matrices("soap_muon", build, axes)


def soap_muon(
    axes: Any = None,
    learning_rate: Rate = 0.02,
    weight_decay: Hyperparameter = 0.0,
    *,
    newton_schulz: str | NewtonSchulz = "jordan",
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    decay: Hyperparameter = 0.9,
    eps: Hyperparameter = EPS,
    every: Hyperparameter = 1,
    max_side: int = MAX_SIDE,
    scale: str = "spectral_max",
    dtype: DTypeLike = "bfloat16",
    buffer_dtype: DTypeLike | None = None,
    per_head: bool = False,
    cautious_decay: bool = False,
    adam_learning_rate: Rate = 3e-3,
    adam_b1: Hyperparameter = 0.9,
    adam_b2: Hyperparameter = 0.95,
    adam_eps: Hyperparameter = 1e-8,
    adam_weight_decay: Hyperparameter | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds SOAP-Muon for the matrices and AdamW for everything else, as in the trainer.

    Args:
        axes: see `resolve_axes`; by default a rule decides by name and rank.
        newton_schulz, momentum, nesterov, decay, eps, every: see `scale_by_soap_muon`.
        max_side, buffer_dtype: see `precondition`.
        scale, dtype, per_head: see `build_unit_step`.
        cautious_decay: see `complete_optimizer`.
        adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay: see `AdamW`.
    """
    options = {"max_side": max_side, "buffer_dtype": buffer_dtype, "per_head": per_head}
    options |= {"scale": scale, "dtype": jnp.dtype(dtype)}
    own = newton_schulz, momentum, nesterov, decay, eps, every
    return complete_optimizer(
        "soap_muon",
        lambda axes: scale_by_soap_muon(axes, *own, **options),
        learning_rate,
        weight_decay,
        AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay),
        axes,
        cautious_decay,
        View("spectral", scale, per_head),
    )


def build_soap_muon(
    cfg: OptimConfig, axes: AxesTree, mesh: Mesh | None, square: Route | None
) -> optax.GradientTransformationExtraArgs:
    """Builds a config's SOAP-Muon direction of matrices, before the rate.

    Args:
        axes: pytree of Axes, like params, all matrices.
        mesh: mesh over which params are split; None means one device.
        square: route of Newton-Schulz' symmetric products; None means XLA.
    """
    return scale_by_soap_muon(
        axes,
        build_newton_schulz(cfg, square),
        cfg.momentum,
        cfg.nesterov,
        **preconditioner_options(cfg),
        mesh=mesh,
        scale=cfg.scale,
        dtype=jnp.dtype(cfg.ns_dtype),
        per_head=cfg.per_head,
    )

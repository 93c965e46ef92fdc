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

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import AxesTree
from jaxtrain.ops.routes import Route
from jaxtrain.optim.lmo import MatrixFunction, build_unit_step
from jaxtrain.optim.muon import JORDAN, build_newton_schulz
from jaxtrain.optim.precision import average, widest
from jaxtrain.optim.preconditioner import (
    MAX_SIDE,
    as_matrices,
    check_range,
    precondition,
    preconditioner_options,
    rotate,
    rotate_back,
)

EPS = 2e-14  # the record's 1e-8, for a mean loss: its loss is a sum over 524,288 tokens


def scale_by_soap_muon(
    axes: AxesTree,
    newton_schulz: MatrixFunction = JORDAN,
    momentum: float = 0.95,
    nesterov: bool = True,
    decay: float = 0.9,
    eps: float = EPS,
    every: int = 1,
    max_side: int = MAX_SIDE,
    buffer_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    **options,
) -> optax.GradientTransformationExtraArgs:
    """Builds SOAP-Muon's direction; the defaults are those of record #44.

    Args:
        axes: pytree of Axes, like params, all matrices.
        momentum: decay of the averaged gradient, in [0, 1).
        nesterov: averages the gradient into the momentum a second time before the step.
        decay: decay of the averaged square and of the factors, in [0, 1).
        eps: floor of the root of the averaged square.
        every: steps from one refresh of the bases to the next.
        max_side, buffer_dtype, mesh: see `precondition`.
        options: further arguments of `build_unit_step`.

    Raises:
        ValueError: an argument is out of range.
    """
    check_range("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
    unit_step = build_unit_step(newton_schulz, **options)

    def direction(a, g, state, progress):
        mean = progress.average(momentum, state.momentum, g)
        ahead = average(momentum, mean, g, widest(mean, g)) if nesterov else mean
        rotated_XIO = rotate(as_matrices(a, ahead, state), state)
        square_XIO = progress.average(decay, state.square, rotated_XIO**2, progress.has_bases)
        root_XIO = jnp.maximum(jnp.sqrt(square_XIO), eps)
        divided_XIO = rotate_back(rotated_XIO / jnp.where(progress.has_bases, root_XIO, 1), state)
        u = unit_step(a, a.from_matrices(divided_XIO, g.shape))
        return u, state._replace(momentum=mean, square=square_XIO)

    return precondition(axes, direction, decay, every, max_side, buffer_dtype, mesh)


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

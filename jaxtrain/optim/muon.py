"""Muon: momentum, then each matrix replaced by the nearest semi-orthogonal one.

It is the unit step in the spectral norm (lmo.py), computed by Newton-Schulz (newton_schulz.py). On
a mesh every device orthogonalises whole matrices (sharded_muon.py).

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import AxesTree
from jaxtrain.ops import fused
from jaxtrain.ops.routes import Route
from jaxtrain.optim import Hyperparameter
from jaxtrain.optim.complete import AdamW, Rate, View, complete_optimizer
from jaxtrain.optim.default_axes import build_for_matrices
from jaxtrain.optim.lmo import buffer_dtype, scale_by_lmo
from jaxtrain.optim.newton_schulz import NewtonSchulz
from jaxtrain.optim.sharded_muon import build_sharded_map

JORDAN = NewtonSchulz()  # five iterations of the quintic that the source gives


def scale_by_muon(
    axes: Any = None,
    newton_schulz: str | NewtonSchulz = "jordan",
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    scale: str = "spectral_max",
    dtype: DTypeLike = "bfloat16",
    buffer_dtype: DTypeLike | None = None,
    per_head: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalises Nesterov momentum, matrix by matrix; the defaults equal torch.optim.Muon's.

    Every parameter must be a matrix: `muon` is the optimizer of a whole model.

    Args:
        axes: see `resolve_axes`.
        newton_schulz: a key or rows of COEFFICIENTS, or the iteration itself.
            optax.inject_hyperparams takes a NewtonSchulz() for a schedule unless static_args names
            newton_schulz.
        momentum, nesterov, buffer_dtype: see `scale_by_lmo`.
        scale, dtype, per_head: see `build_unit_step`.

    Raises:
        ValueError: an option is unknown or out of range, or (at init) a parameter is no matrix.
    """
    if not callable(newton_schulz):
        newton_schulz = NewtonSchulz(newton_schulz)
    options = {"scale": scale, "dtype": jnp.dtype(dtype), "per_head": per_head}

    def build(axes):
        return scale_by_lmo(axes, newton_schulz, momentum, nesterov, buffer_dtype, **options)

    return build_for_matrices("muon", build, axes)


def muon(
    axes: Any = None,
    learning_rate: Rate = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    *,
    newton_schulz: str | NewtonSchulz = "jordan",
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
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
    """Builds Muon for the matrices and AdamW for everything else, as in the trainer.

    `complete_optimizer` explains rates and decay; `describe` prints who is stepped by what. The
    defaults for matrices are torch.optim.Muon's, and AdamW's are the trainer's.

    Args:
        axes: see `resolve_axes`; by default a rule decides by name and rank.
        newton_schulz, momentum, nesterov, scale, dtype, buffer_dtype, per_head: see
            `scale_by_muon`.
        cautious_decay: see `complete_optimizer`.
        adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay: see `AdamW`.
    """
    options = {"newton_schulz": newton_schulz, "momentum": momentum, "nesterov": nesterov}
    options |= {"scale": scale, "dtype": dtype, "buffer_dtype": buffer_dtype, "per_head": per_head}
    return complete_optimizer(
        "muon",
        lambda axes: scale_by_muon(axes, **options),
        learning_rate,
        weight_decay,
        AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay),
        axes,
        cautious_decay,
        View("spectral", scale, per_head),
    )


def has_whole_steps(cfg: OptimConfig) -> bool:
    """Returns whether every replica gets all of a config's steps from `build_muon`.

    They travel in cfg.ns_dtype then. All other steps stay split like their moments, and
    build_optimizer gathers them: the buffers of an acceleration are split too.
    """
    is_split = cfg.accelerates or cfg.geometry != "spectral"
    return not is_split and cfg.name in ("muon", "normuon", "muon_h")


def build_muon(
    cfg: OptimConfig,
    axes: AxesTree,
    mesh: jax.sharding.Mesh | None,
    square: Route | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    """Builds the direction of matrices before the rate: Muon's, or that of another optim.geometry.

    Args:
        axes: pytree of Axes, like params, all matrices.
        mesh: mesh over which params are split; None means one device.
        square: route of Newton-Schulz' symmetric products; None means XLA.
    """
    options = {
        "momentum": cfg.momentum,
        "nesterov": nesterov,
        "scale": cfg.scale,
        "dtype": jnp.dtype(cfg.ns_dtype),
        "buffer_dtype": buffer_dtype(cfg),
        "per_head": cfg.per_head,
    }
    if cfg.geometry != "spectral":
        return scale_by_lmo(axes, cfg.geometry, **options)
    if mesh is not None and mesh.size > 1:
        options["map_matrices"] = build_sharded_map(mesh, has_whole_steps(cfg))
    return scale_by_lmo(axes, build_newton_schulz(cfg, square), **options)


def build_newton_schulz(cfg: OptimConfig, square: Route | None) -> NewtonSchulz:
    """Builds a config's iteration.

    Args:
        square: route of its symmetric products; None means XLA.
    """
    kernel = fused.build_square(square) if square is not None and square.is_fused else None
    # torch.optim.Muon casts even float64 to bfloat16; our other forms iterate in float64.
    dtype = jnp.dtype(cfg.ns_dtype) if cfg.ns_form == "torch" else None
    steps = cfg.ns_steps or None
    return NewtonSchulz(cfg.ns_coefficients, steps, dtype, form=cfg.ns_form, kernel=kernel)

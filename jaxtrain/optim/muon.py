"""Muon: momentum, then each matrix replaced by the nearest semi-orthogonal one.

It is the unit step in the spectral norm (lmo.py), computed by Newton-Schulz (newton_schulz.py). On
a mesh every device orthogonalises whole matrices (sharded_muon.py).

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

import jax
import jax.numpy as jnp
import optax

from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import AxesTree
from jaxtrain.ops import fused
from jaxtrain.ops.routes import Route
from jaxtrain.optim.lmo import buffer_dtype, scale_by_lmo
from jaxtrain.optim.newton_schulz import NewtonSchulz
from jaxtrain.optim.sharded_muon import build_sharded_map

JORDAN = NewtonSchulz()  # five iterations of the quintic that the source gives


def scale_by_muon(
    axes: AxesTree, newton_schulz: NewtonSchulz = JORDAN, **options
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalises Nesterov momentum, matrix by matrix; the defaults equal torch.optim.Muon's.

    Args:
        axes: pytree of Axes, like params, all matrices.
        options: further arguments of `scale_by_lmo`.
    """
    return scale_by_lmo(axes, newton_schulz, **options)


def muon(
    axes: AxesTree,
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    weight_decay: float = 0.1,
    **options,
) -> optax.GradientTransformation:
    """Builds Muon as a complete optimizer without a config, with the defaults of torch.optim.Muon.

    Decay is decoupled: p <- p - learning_rate * (weight_decay * p + direction).

    Args:
        axes: pytree of Axes, like params, all matrices.
        options: further arguments of `scale_by_muon`.
    """
    return optax.chain(
        scale_by_muon(axes, **options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def has_whole_steps(cfg: OptimConfig) -> bool:
    """Returns whether every replica gets all of a config's steps from `build_muon`.

    They travel in cfg.ns_dtype then. All other steps stay split like their moments, and
    build_optimizer gathers them: the buffers of accelerated_lmo's wrapper are split too.
    """
    return cfg.geometry == "spectral" and cfg.name in ("muon", "normuon", "muon_h")


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
    return scale_by_muon(axes, build_newton_schulz(cfg, square), **options)


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

"""Scales steps and initial values by width and depth, so that the best rate stays the same.

With optim.parametrisation=spectral, a matrix and its steps have spectral norms of sqrt(outputs /
inputs): every entry of every activation then changes by an amount that does not depend on the
width. What is written to the residual stream is divided by the depth (CompleteP). All factors are
1 at width optim.base_width and depth optim.base_depth. They are folded into initial values and
steps, so that the forward pass and exported weights are those of an ordinary transformer.

docs/transfer.md lists the rules.

Source: Yang et al. 2022, https://arxiv.org/abs/2203.03466 (muP: AdamW, head, embedding); Yang,
Simon & Bernstein 2023, https://arxiv.org/abs/2310.17813 (spectral norms); Dey et al. 2025,
https://arxiv.org/abs/2505.01618 (depth, Adam's eps)
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import optax

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import ArrayTree, AxesTree, named_leaves

if TYPE_CHECKING:
    from jaxtrain.config.train_config import TrainConfig
    from jaxtrain.model.transformer import Model


class Factors(NamedTuple):
    """How spectral changes one parameter's steps, relative to standard."""

    step: float = 1.0  # of the step, but not of its weight decay
    eps: float = 1.0  # of Adam's eps, as gradients shrink with width and depth


def _writes_residual(name: str, axes: Axes) -> bool:
    """Returns whether a parameter scales the output of a layer's attention or MLP.

    These are the matrices to the residual stream, their biases, and the gains of norms after them.
    """
    is_bias = name.endswith(".b") and axes.inputs == ("D",)
    return axes.outputs == ("D",) or is_bias or "post_norm." in name


def _scales_tied_logits(name: str, has_head: bool) -> bool:
    """Returns whether a parameter is the final norm's before a head that is the embedding.

    An embedding needs entries of order 1 and a head of order 1/D. The final norm's gain makes up
    for the difference: with an untied head, the factor is in the head.
    """
    return name.startswith("final_norm.") and not has_head


def step_factors(
    cfg: OptimConfig, name: str, axes: Axes, shape: tuple[int, ...], has_head: bool
) -> Factors:
    """Returns the factors of one parameter; all are 1 with parametrisation=standard.

    Args:
        name: path of the parameter, as "blocks.mlp.up.w".
        shape: of the parameter, which has its width and depth; a dim it lacks scales nothing.
        has_head: whether the model has a separate head, not tied to the embedding.
    """
    if cfg.parametrisation == "standard":
        return Factors()
    sizes = dict(zip(axes.letters, shape, strict=True))
    width = cfg.base_width / sizes.get("D", cfg.base_width)
    depth = cfg.base_depth / sizes.get("L", cfg.base_depth)
    writes, ties = _writes_residual(name, axes), _scales_tied_logits(name, has_head)
    step = depth if writes else 1.0
    if axes.is_matrix and cfg.name != "adamw":
        # An orthogonal step has spectral norm 1; match_rms multiplies it by the root of the width.
        step *= width**0.5 if cfg.scale == "match_rms" else 1.0
    elif axes.is_matrix or (axes.role == "head" and cfg.rest == "adamw") or ties:
        step *= width  # Adam's steps have entries of 1, which add up over the inputs
    eps = (1.0 if axes.role == "head" or ties else width) * (1.0 if writes else depth)
    return Factors(step, eps)


def scale_by_size(
    cfg: OptimConfig,
    axes: AxesTree,
    direction: optax.GradientTransformationExtraArgs,
    is_adam: bool,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each parameter's direction by its step factor and Adam's eps by its eps factor.

    Args:
        axes: pytree of Axes of all parameters; the direction may be that of a part of them.
        is_adam: whether the direction has Adam's eps.

    Raises:
        ValueError: parametrisation is spectral, and no parameter has a dim D, the width.
    """
    if cfg.parametrisation == "standard":
        return direction
    if not any("D" in leaf.letters for leaf in jax.tree.leaves(axes)):
        raise ValueError(
            "axes must name the width D and the layers L with optim.parametrisation=spectral; got "
            f"{', '.join(map(str, jax.tree.leaves(axes)))}. Set --optim.parametrisation=standard."
        )
    named_axes, has_head = named_leaves(axes), has_own_head(axes)

    def update(updates, state, params=None, **extra):
        factors = [
            step_factors(cfg, name, named_axes[name], u.shape, has_head)
            for name, u in named_leaves(updates).items()
        ]
        if is_adam:  # g / e divided by its own size plus eps is g divided by its size plus e * eps
            updates = _multiply(updates, [1 / factor.eps for factor in factors])
        updates, state = direction.update(updates, state, params, **extra)
        return _multiply(updates, [factor.step for factor in factors]), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def scale_initial_values(cfg: "TrainConfig", model: "Model") -> "Model":
    """Returns the model with an `init` that is scaled by width and depth.

    Matrices and an untied head need no factor: their standard initial values have it.
    """
    if cfg.optim.parametrisation == "standard":
        return model
    from jaxtrain.model.initialization import embedding_std  # has Flax, which recipes do without

    base = dataclasses.replace(cfg.model, D=cfg.optim.base_width)
    has_head = has_own_head(model.axes)

    def factor(name, axes):
        if axes.role == "embedding":
            return embedding_std(base) / embedding_std(cfg.model)
        if _scales_tied_logits(name, has_head):
            return base.D / cfg.model.D
        return cfg.optim.base_depth / cfg.model.L if "post_norm." in name else 1.0

    factors = [factor(name, axes) for name, axes in named_leaves(model.axes).items()]
    return model._replace(init=lambda key: _multiply(model.init(key), factors))


def has_own_head(axes: AxesTree) -> bool:
    """Returns whether a model has a separate head; else its embedding is the head, too."""
    return any(leaf.role == "head" for leaf in jax.tree.leaves(axes))


def _multiply(tree: ArrayTree, factors: Sequence[float]) -> ArrayTree:
    """Multiplies each leaf by its factor; a factor of 1 adds no operation to the program."""
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, factors, strict=True)
    return structure.unflatten([x if factor == 1 else factor * x for x, factor in pairs])

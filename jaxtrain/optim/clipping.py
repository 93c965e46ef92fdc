"""Gradient clipping by the global norm."""

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optim import Hyperparameter, check_number, is_zero
from jaxtrain.optim.precision import widest


def clip_gradients(
    max_norm: Hyperparameter, eps: Hyperparameter = 0.0
) -> optax.GradientTransformation:
    """Scales all gradients by one factor so that their joint 2-norm is at most max_norm.

    Clipped gradients have the widest type of gradient and parameter, float32 at least.

    Args:
        max_norm: the number 0 disables clipping.
        eps: added to the norm: the factor is min(1, max_norm / (norm + eps)). 1e-6 equals
            torch.nn.utils.clip_grad_norm_ (PyTorch 2.13, torch/nn/utils/clip_grad.py).

    Raises:
        ValueError: max_norm or eps is negative, or a schedule.
    """
    check_number(max_norm, "max_norm", "optim.clip_norm")
    check_number(eps, "eps", "optim.clip_eps")
    if is_zero(max_norm):
        return optax.identity()

    def clip(updates, params=None):
        params = updates if params is None else params
        updates = jax.tree.map(lambda g, p: g.astype(widest(g, p)), updates, params)
        # One factor, and not a division by the norm for each gradient as in optax: XLA repeats a
        # product in every average that reads it, but stores the result of a division, which is a
        # second tree of gradients.
        factor = jnp.minimum(max_norm / (optax.tree.norm(updates) + eps), 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)

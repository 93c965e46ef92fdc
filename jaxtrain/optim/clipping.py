"""Gradient clipping by the global norm."""

import jax
import jax.numpy as jnp
import optax


def clip_gradients(max_norm: float, eps: float = 0.0) -> optax.GradientTransformation:
    """Scales all gradients by one factor so that their joint 2-norm is at most max_norm.

    Args:
        max_norm: 0 disables clipping.
        eps: added to the norm: the factor is min(1, max_norm / (norm + eps)). 1e-6 equals
            torch.nn.utils.clip_grad_norm_ (PyTorch 2.13, torch/nn/utils/clip_grad.py).
    """
    if not max_norm:
        return optax.identity()
    if not eps:
        return optax.clip_by_global_norm(max_norm)

    def clip(updates, params=None):
        del params
        factor = jnp.minimum(max_norm / (optax.tree.norm(updates) + eps), 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)

"""Gradient clipping by the global norm."""

import optax


def clip_gradients(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by one factor so that their joint 2-norm is at most max_norm.

    Args:
        max_norm: 0 disables clipping.
    """
    return optax.clip_by_global_norm(max_norm) if max_norm else optax.identity()

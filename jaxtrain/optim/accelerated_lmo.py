"""Muon that takes gradients ahead of its iterate, as a complete optimizer (acceleration.py)."""

from typing import Any

import optax
from jax.typing import DTypeLike

from jaxtrain.optim import Hyperparameter
from jaxtrain.optim.acceleration import Strength, gradient_transport
from jaxtrain.optim.complete import AdamW, Rate, View, complete_optimizer
from jaxtrain.optim.muon import scale_by_muon
from jaxtrain.optim.newton_schulz import NewtonSchulz


def accelerated_lmo(
    axes: Any = None,
    learning_rate: Rate = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    *,
    strength: Strength = 0.25,
    newton_schulz: str | NewtonSchulz = "jordan",
    momentum: Hyperparameter = 0.9,
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
    """Builds Muon with gradient transport for the matrices, and AdamW for everything else.

    Transport replaces Nesterov's momentum. Evaluate at `eval_params(opt_state, params)`.

    It must be the last transform of a chain: a later one that scales or projects its updates would
    leave a wrong iterate in the state. Change the rate by learning_rate=schedule or by
    optax.inject_hyperparams. Restore the state with a template of its types, such as
    jax.eval_shape(optimizer.init, params).

    Args:
        strength: in [0, 1], or a schedule; see `gradient_transport`. The other arguments are those
            of `muon`, but the momentum is 0.9 by default.
    """
    options = {"newton_schulz": newton_schulz, "momentum": momentum, "nesterov": False}
    options |= {"scale": scale, "dtype": dtype, "buffer_dtype": buffer_dtype, "per_head": per_head}
    return complete_optimizer(
        "accelerated_lmo",
        lambda axes: scale_by_muon(axes, **options),
        learning_rate,
        weight_decay,
        AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay),
        axes,
        cautious_decay,
        View("spectral", scale, per_head),
        wrap=lambda inner: gradient_transport(inner, momentum, strength, buffer_dtype),
    )

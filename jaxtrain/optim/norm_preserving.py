"""MuonH and AdamH as complete optimizers: every matrix keeps its Frobenius norm (rate_step.py)."""

from typing import Any

import optax
from jax.typing import DTypeLike

from jaxtrain.optim import Hyperparameter
from jaxtrain.optim.adam import scale_by_adam
from jaxtrain.optim.complete import AdamW, Rate, Stepper, View, complete_optimizer
from jaxtrain.optim.muon import scale_by_muon
from jaxtrain.optim.newton_schulz import NewtonSchulz
from jaxtrain.optim.rate_step import keep_norms


def _restores_norms(per_head: bool) -> Stepper:
    return lambda direction, groups, axes, schedule: optax.chain(
        direction, keep_norms(groups, axes, schedule, per_head)
    )


def muon_h(
    axes: Any = None,
    learning_rate: Rate = 0.018,
    weight_decay: Hyperparameter = 0.0,
    *,
    newton_schulz: str | NewtonSchulz = "jordan",
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    dtype: DTypeLike = "bfloat16",
    buffer_dtype: DTypeLike | None = None,
    per_head: bool = False,
    cautious_decay: bool = False,
    adam_learning_rate: Rate = 3e-3,
    adam_b1: Hyperparameter = 0.9,
    adam_b2: Hyperparameter = 0.95,
    adam_eps: Hyperparameter = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Builds MuonH for the matrices and AdamW for everything else, as in the trainer.

    Args:
        learning_rate: share of its norm that a matrix moves by in a step; see `keep_norms`.
        weight_decay: of embeddings and heads; matrices do not decay. The other arguments are those
            of `muon`.
    """
    options = {"newton_schulz": newton_schulz, "momentum": momentum, "nesterov": nesterov}
    options |= {"scale": "none", "dtype": dtype, "buffer_dtype": buffer_dtype, "per_head": per_head}
    return complete_optimizer(
        "muon_h",
        lambda axes: scale_by_muon(axes, **options),
        learning_rate,
        weight_decay,
        AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps),
        axes,
        cautious_decay,
        View("spectral", per_head=per_head),
        _restores_norms(per_head),
    )


def adam_h(
    axes: Any = None,
    learning_rate: Rate = 0.018,
    weight_decay: Hyperparameter = 0.0,
    *,
    per_head: bool = False,
    cautious_decay: bool = False,
    adam_learning_rate: Rate = 3e-3,
    adam_b1: Hyperparameter = 0.9,
    adam_b2: Hyperparameter = 0.95,
    adam_eps: Hyperparameter = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Builds AdamH for the matrices and AdamW for everything else, with the same averages.

    Args:
        learning_rate, weight_decay: see `muon_h`. The other arguments are those of `muon`.
    """
    return complete_optimizer(
        "adam_h",
        lambda axes: scale_by_adam(adam_b1, adam_b2, adam_eps),
        learning_rate,
        weight_decay,
        AdamW(adam_learning_rate, adam_b1, adam_b2, adam_eps),
        axes,
        cautious_decay,
        View(per_head=per_head),
        _restores_norms(per_head),
    )

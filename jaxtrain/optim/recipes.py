"""Whole optimizers for matrices, to use without a config: rate and decay included."""

import optax

from jaxtrain.optim.acceleration import transported
from jaxtrain.optim.lmo import scale_by_lmo
from jaxtrain.optim.normuon import balance_neurons


def muon(axes, learning_rate=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, **options):
    """torch.optim.Muon, default for default, on the matrices that `axes` declares.

    Decay is decoupled: p <- p - rate * (weight_decay * p + direction).

    Args:
        axes: pytree of Axes, like params.
        learning_rate: float or optax schedule.
        options: of `scale_by_lmo`.
    """
    return optax.chain(
        scale_by_lmo(axes, momentum=momentum, nesterov=nesterov, **options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def normuon(axes, learning_rate=1e-3, weight_decay=0.1, neuron_decay=0.95, **options):
    """muon with steps of one length for every neuron; options as muon's."""
    return optax.chain(
        scale_by_lmo(axes, **options),
        balance_neurons(axes, neuron_decay),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def accelerated_lmo(
    axes, learning_rate=1e-3, weight_decay=0.1, momentum=0.9, strength=0.25, **options
):
    """Any norm's step with transported gradients, the spectral one's by default.

    Evaluate at `eval_params(opt_state, params)`. Options as muon's; transport takes the place of
    Nesterov's mixing.
    """
    inner = muon(axes, learning_rate, weight_decay, momentum, nesterov=False, **options)
    return transported(inner, momentum, strength)

"""The factor of the learning rates in a step whose batch is larger or smaller than data.batch."""

from jaxtrain.optim import select_option

SCALINGS = {
    # The noise of the gradient falls with the root of the batch, and the update of an optimizer
    # that divides by the gradient's size does not grow with it. Malladi et al. 2022, which also
    # changes the betas, https://arxiv.org/abs/2205.10287
    "sqrt": lambda ratio: ratio**0.5,
    # For updates that are linear in the gradient, as those of SGD: Goyal et al. 2017,
    # https://arxiv.org/abs/1706.02677
    "linear": lambda ratio: ratio,
    "none": lambda ratio: 1.0,
}


def rate_factor(scaling: str, sequences: int, batch: int) -> float:
    """Returns what all rates are multiplied by in a step of `sequences`; exactly 1 for `batch`.

    Args:
        scaling: optim.batch_scaling.
        batch: data.batch, whose rates the config has.
    """
    return select_option(SCALINGS, scaling, "optim.batch_scaling")(sequences / batch)

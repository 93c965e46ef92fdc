"""Averages the training loss of each source of a mixture, from one logged step to the next."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxtrain.training.step import BY_SOURCE


class SourceLosses:
    """Collects what the steps return by source, without waiting for the device.

    Args:
        names: of the sources, by their number in a batch; none without a mixture.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._steps: list[jax.Array] = []  # [2,S] of each step, see build_step

    def take_from(self, scalars: dict[str, jax.Array]) -> None:
        """Moves a step's figures by source out of its scalars."""
        if self._names:
            self._steps.append(scalars.pop(BY_SOURCE))

    def means(self) -> dict[str, float]:
        """Returns `train/SOURCE_loss_nats` over the steps since the last call.

        A source that these steps did not read has no entry. Skipped steps do not count.
        """
        steps, self._steps = jax.device_get(self._steps), []
        finite = [step for step in steps if np.isfinite(step).all()]
        if not finite:
            return {}
        nats, shares = np.stack(finite).astype(np.float64).sum(0)
        figures = zip(self._names, nats, shares, strict=True)
        return {f"train/{name}_loss_nats": float(x / share) for name, x, share in figures if share}

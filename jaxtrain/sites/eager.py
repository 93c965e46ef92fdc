"""Eager outer steps: what a site takes at once of a round that is still exchanged. Pure functions.

The sites' mean change has a part that a site knows at once: its own change times its share of the
tokens, which is taken to be that of the round before. During a delay the site trains on from where
the outer step along this part leads. Like the true step, it begins with the newest reference and
momentum, which hold the other sites' changes up to the round before:

    known = share * (reference - theta)
    eager = reference - mu * (mu * momentum + rate * known) - rate * known

When the round is complete, the true step replaces the eager one, of which only this site's weights
ever knew: the reference and the momentum follow the true means alone.

eager - theta is linear in theta. With offset and slope, which are known before the round starts,

    eager - theta = offset + slope * theta

so the devices need not wait for the host.

With a plain delay a site trains on with the whole of its own change. Where training then takes back
a difference between two sites, and the result does so too, the difference returns with the opposite
sign in the next round, and nothing damps it. A share of 1 / 2 halves it each time. The other sites'
last changes are no part of the step, because the reference has them already.

Source: Kale, Douillard and Donchev 2025, https://arxiv.org/abs/2502.12996. There each site has an
outer optimizer of its own, which takes the site's part at once and the others' with its next step.
"""

import numpy as np

from jaxtrain.config.run_sections import SitesConfig
from jaxtrain.sites import BLOCK
from jaxtrain.sites.outer import CHUNK, NOTHING


def eager_slope(share: float, rate: float, mu: float) -> float:
    """Returns the slope of eager steps.

    Args:
        share: this site's share of all sites' tokens.
        rate, mu: the outer rate and momentum.
    """
    return (1 + mu) * rate * share - 1


def eager_offset(
    reference: np.ndarray, momentum: np.ndarray, slope: float, mu: float
) -> np.ndarray:
    """Returns the offset of an eager step, float32 [n], n a multiple of BLOCK (1,024).

    Args:
        reference, momentum: before the step, float32 [n]; momentum is empty if mu is 0.
    """
    offset = np.empty_like(reference)
    for start in range(0, reference.size, CHUNK * BLOCK):
        part = slice(start, min(start + CHUNK * BLOCK, reference.size))
        wide = -slope * reference[part].astype(np.float64)
        offset[part] = wide - mu * mu * momentum[part] if mu else wide
    return offset


def eager_step(offset: np.ndarray, slope: float, weights: np.ndarray) -> np.ndarray:
    """Returns eager - theta, as it was added to the weights theta on the devices: float32 [n]."""
    return offset + np.float32(slope) * weights


def eager_terms(
    cfg: SitesConfig, reference: np.ndarray, momentum: np.ndarray, share: float
) -> tuple[np.ndarray, float]:
    """Returns the offset and the slope of the next eager step; an empty offset without one."""
    if not cfg.eager:
        return NOTHING, 0.0
    slope = eager_slope(share, cfg.rate, cfg.momentum)
    return eager_offset(reference, momentum, slope, cfg.momentum), slope

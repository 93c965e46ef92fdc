"""Weights with which checkpoints are averaged.

An average of checkpoints is a decay after the fact. Between checkpoints i-1 and i the weights moved
by d_i, so that the average with weights c_0..c_k is checkpoint 0 plus the sum of f_i d_i, where
f_i = c_i + ... + c_k falls from 1 to 0: the factor by which a decay would have scaled the rate over
that interval, if the gradients had been the same. Turned around, a decay gives the weights
c_0 = 1 - f_1, c_i = f_i - f_(i+1), c_k = f_k.

Source: Tian et al. 2025 (WSM), https://arxiv.org/abs/2507.17634. Here f_i is the decay's mean over
the interval, in steps, so that checkpoints need not be equally far apart.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import pi, sin

# Decay -> the integral from 0 to x of its factor, which falls from 1 at x=0 to 0 at x=1.
DECAYS: dict[str, Callable[[float], float]] = {
    "sqrt": lambda x: x - 2 / 3 * x**1.5,  # 1 - sqrt(x)
    "linear": lambda x: x - x**2 / 2,  # 1 - x
    "cosine": lambda x: (x + sin(pi * x) / pi) / 2,  # (1 + cos(pi x)) / 2
}


def _uniform(steps: Sequence[int], decay: str) -> list[float]:
    del decay
    return [1 / len(steps)] * len(steps)


def _linear(steps: Sequence[int], decay: str) -> list[float]:
    """Weights 1, 2, 3, ...: later checkpoints count more."""
    del decay
    total = len(steps) * (len(steps) + 1) // 2
    return [float(Fraction(i + 1, total)) for i in range(len(steps))]


def _wsm(steps: Sequence[int], decay: str) -> list[float]:
    """Weights that emulate a decay from the first step to the last."""
    integral, span = DECAYS[decay], steps[-1] - steps[0]
    places = [(step - steps[0]) / span for step in steps]
    pairs = zip(places, places[1:], strict=False)
    factors = [1.0, *((integral(b) - integral(a)) / (b - a) for a, b in pairs), 0.0]
    return [a - b for a, b in zip(factors, factors[1:], strict=False)]


SCHEMES = {"uniform": _uniform, "linear": _linear, "wsm": _wsm}


def merge_weights(steps: Sequence[int], scheme: str, decay: str = "sqrt") -> list[float]:
    """Returns the weight of each checkpoint; all are positive, and their sum is 1.

    Args:
        steps: two or more steps of checkpoints, ascending.
        scheme: a key of SCHEMES.
        decay: with wsm, the decay that is emulated, a key of DECAYS.
    """
    assert len(steps) > 1 and list(steps) == sorted(set(steps)), steps  # merge checks
    return SCHEMES[scheme](steps, decay)

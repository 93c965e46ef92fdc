"""Statistics of autocorrelated series: percentiles, trends, block bootstrap and noise."""

import math
import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

RESAMPLES = 1_000
SEED = 0  # fixed, so that the same runs give the same interval


def percentile(values: Sequence[float], share: float) -> float:
    """Returns a percentile, interpolated linearly between neighbours."""
    return float(np.quantile(values, share))


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation of a sample of at least two values."""
    return float(np.std(values, ddof=1))


def block_length(count: int) -> int:
    """Returns the bootstrap's block length for `count` steps: their cube root, the optimal rate.

    Source: Hall, Horowitz & Jing 1995, https://doi.org/10.1093/biomet/82.3.561
    """
    return max(1, round(count ** (1 / 3)))


def resample(runs: list[list[float]], rng: random.Random) -> list[list[float]]:
    """Draws runs with replacement, and blocks of consecutive steps within each of them.

    A series is treated as a circle, so that its ends are drawn as often as its middle.
    Source: Politis & Romano 1992, A circular block-resampling procedure for stationary data.
    """
    drawn = []
    for run in rng.choices(runs, k=len(runs)):
        length, steps = block_length(len(run)), []
        circle = run + run[:length]
        for start in rng.choices(range(len(run)), k=math.ceil(len(run) / length)):
            steps += circle[start : start + length]
        drawn.append(steps[: len(run)])
    return drawn


def bootstrap(
    compute: Callable[[list], dict[str, float]],
    sides: list[list[list[float]]],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, tuple[float, float]]:
    """Returns 95 % confidence intervals of statistics of several series.

    Args:
        compute: resampled sides -> {name: value}.
        sides: for each side, its runs, each a list of step times in order.

    Returns:
        {name: (low, high)}, the percentiles 2.5 and 97.5 of the resampled values.
    """
    rng = random.Random(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        for name, value in compute([resample(runs, rng) for runs in sides]).items():
            drawn.setdefault(name, []).append(value)
    return {k: (percentile(v, 0.025), percentile(v, 0.975)) for k, v in drawn.items()}


def split(values: Sequence[Any], parts: int) -> list[Any]:
    """Returns consecutive parts whose lengths differ by at most one."""
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    return [values[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Replaces each value by the mean of itself and of equally many neighbours on either side.

    The number on each side is at most 1/40 of all points and 1/8 of those before, so that the
    steep start of a loss curve stays sharp.
    """
    count = len(points)
    sums = np.cumsum([0.0, *(value for _, value in points)])
    index = np.arange(count)
    half = np.minimum(np.minimum(index // 8, count // 40), count - 1 - index)
    trend = (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
    return [(step, mean) for (step, _), mean in zip(points, trend.tolist(), strict=True)]


def noise(values: Sequence[float]) -> float:
    """Returns the standard deviation of white noise on a smooth curve of at least 3 values.

    A second difference of neighbours cancels a straight line and has 6 times the noise's variance.
    Source: Gasser, Sroka & Jennen-Steinmetz 1986, https://doi.org/10.1093/biomet/73.3.625
    """
    return math.sqrt(fmean(np.diff(values, 2) ** 2) / 6)


def t_quantile(share: float, freedom: int) -> float:
    """Returns the quantile of Student's t distribution at `share`, in (0, 1)."""
    from scipy.stats import t  # takes a second to import; summaries do without it

    return float(t.ppf(share, freedom))


def histogram(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    """Counts values in `bins` equal parts of [low, high]; the outer two include all beyond."""
    edges = np.linspace(low, high, bins + 1)[1:-1]
    return np.bincount(np.searchsorted(edges, values), minlength=bins).tolist()

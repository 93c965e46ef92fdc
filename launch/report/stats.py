"""Statistics of autocorrelated series: percentiles, block bootstrap, Student's t and noise."""

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence

RESAMPLES = 1_000
SEED = 0  # fixed, so that the same runs give the same interval


def percentile(values: Sequence[float], share: float) -> float:
    """Returns a percentile, interpolated linearly between neighbours as NumPy does."""
    values = sorted(values)
    at = share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def mean(values: Sequence[float]) -> float:
    """Returns the mean, with a sum that is rounded once."""
    return math.fsum(values) / len(values)


def median(values: Sequence[float]) -> float:
    """Returns the 50th percentile."""
    return percentile(values, 0.5)


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation of a sample of at least two values."""
    centre = mean(values)
    return math.sqrt(math.fsum((x - centre) ** 2 for x in values) / (len(values) - 1))


def block_length(count: int) -> int:
    """Returns the block length of the bootstrap: the cube root of the steps, the best rate.

    Source: Hall, Horowitz & Jing 1995, https://doi.org/10.1093/biomet/82.3.561
    """
    return max(1, round(count ** (1 / 3)))


def resample(runs: list[list[float]], rng: random.Random) -> list[list[float]]:
    """Draws runs with replacement, and within each run blocks of consecutive steps likewise.

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


def split(values: list, parts: int) -> list[list]:
    """Returns consecutive parts whose lengths differ by at most one."""
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    return [values[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def noise(values: Sequence[float]) -> float:
    """Returns the standard deviation of white noise on a smooth curve of at least 3 values.

    A second difference of neighbours cancels a straight line and has 6 times the noise's variance.
    Source: Gasser, Sroka & Jennen-Steinmetz 1986, https://doi.org/10.1093/biomet/73.3.625
    """
    triples = zip(values, values[1:], values[2:], strict=False)
    return math.sqrt(mean([(a - 2 * b + c) ** 2 for a, b, c in triples]) / 6)


def t_quantile(share: float, freedom: int) -> float:
    """Returns the quantile of Student's t at `share`, for share in (0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < share else (low, middle)
    return high


def _t_cdf(t: float, freedom: int) -> float:
    """Returns P(T <= t) for t >= 0: Simpson's rule over the angle atan(t/sqrt(freedom))."""
    angle, parts = math.atan(t / math.sqrt(freedom)), 400
    heights = [math.cos(angle * i / parts) ** (freedom - 1) for i in range(parts + 1)]
    inner = 4 * math.fsum(heights[1:-1:2]) + 2 * math.fsum(heights[2:-1:2])
    area = (heights[0] + inner + heights[-1]) * angle / parts / 3
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    return 0.5 + math.exp(scale) * area


def histogram(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    """Counts values in `bins` equal parts of [low, high]; the outer two include all beyond."""
    edges = [low + (high - low) * i / bins for i in range(1, bins)]
    counts = [0] * bins
    for value in values:
        counts[bisect_left(edges, value)] += 1
    return counts

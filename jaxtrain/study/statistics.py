"""Compares paired runs: differences with their errors, corrected p-values, and verdicts."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST_PAIRS = 3  # with fewer pairs there is no verdict
# modded-nanogpt's rule for its optimizer track: (target - mean) * sqrt(n) >= 0.004 at a run-to-run
# sigma of 0.0013, which is a one-sided p of 0.001.
# Source: https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization
TRACK_3_SIGMAS = 0.004 / 0.0013

TIES, WINS, LOSES, UNDECIDED = "ties", "wins", "loses", "undecided"


class Paired(NamedTuple):
    """A contender against the baseline, seed by seed; negative differences are lower losses."""

    pairs: int
    difference: float  # mean of contender - baseline
    se: float  # standard error of the difference
    t: float
    p: float  # two-sided


def mean_sd(losses: Sequence[float]) -> tuple[float, float]:
    """Returns mean and sample standard deviation (n - 1); nan or inf if a loss is not finite."""
    values = np.asarray(losses, float)
    if len(values) < 2 or not np.isfinite(values).all():
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std(ddof=1))


def paired_test(losses: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Returns Student's paired t-test of two equally long lists with one entry for each seed.

    If a loss is not finite, all results are nan: a diverged run has no loss to average.

    Raises:
        ValueError: the lists are empty or not equally long.
    """
    if len(losses) != len(baseline) or not len(losses):
        raise ValueError(
            "a paired test must get two lists of the same length, at least 1; got "
            f"{len(losses)} and {len(baseline)} losses."
        )
    if not np.isfinite([*losses, *baseline]).all():
        return Paired(len(losses), math.nan, math.nan, math.nan, math.nan)
    differences = np.asarray(losses, float) - np.asarray(baseline, float)
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Paired(n, mean, math.nan, math.nan, math.nan)
    se = float(differences.std(ddof=1)) / math.sqrt(n)
    if se == 0:  # all differences are equal, so they are certain
        if mean == 0:
            return Paired(n, mean, se, t=0.0, p=1.0)
        return Paired(n, mean, se, t=math.copysign(math.inf, mean), p=0.0)
    t = mean / se
    return Paired(n, mean, se, t, float(2 * stats.t.sf(abs(t), n - 1)))


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p-values corrected for multiple comparisons, in the order given.

    A p of nan stays nan and still counts as a comparison.

    Source: Holm 1979, https://www.jstor.org/stable/4615733
    """
    order = sorted(range(len(ps)), key=lambda i: (math.isnan(ps[i]), ps[i]))
    corrected, largest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        if not math.isnan(ps[i]):
            largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
            corrected[i] = largest
    return corrected


def detectable(paired: Paired, level: float) -> float:
    """Returns the smallest mean difference that is significant at this standard error.

    The level is not corrected for multiple comparisons.
    """
    if paired.pairs < 2:
        return math.nan
    return float(stats.t.isf(level / 2, paired.pairs - 1)) * paired.se


def decide_verdict(
    losses: Sequence[float], baseline: Sequence[float], p_corrected: float, level: float
) -> str:
    """Returns TIES, WINS, LOSES or UNDECIDED for a contender against the baseline.

    With fewer than FEWEST_PAIRS pairs, or if the baseline diverged, it is UNDECIDED. If the
    contender diverged in any run and the baseline in none, it is LOSES, whatever the other losses.
    """
    if len(losses) < FEWEST_PAIRS or not np.isfinite(baseline).all():
        return UNDECIDED
    if not np.isfinite(losses).all():
        return LOSES
    if p_corrected > level:
        return TIES
    return WINS if np.mean(losses) < np.mean(baseline) else LOSES


def pooled_sd(groups: Iterable[Sequence[float]]) -> float:
    """Returns the run-to-run sigma: the groups' variances, weighted by degrees of freedom.

    Groups with one loss or with losses that are not finite are left out. It is nan if none remain.
    """
    arrays = [np.asarray(g, float) for g in groups if len(g) > 1 and np.isfinite(g).all()]
    degrees = sum(len(array) - 1 for array in arrays)
    if not degrees:
        return math.nan
    return math.sqrt(sum(((array - array.mean()) ** 2).sum() for array in arrays) / degrees)


def track_3(losses: Sequence[float], target: float) -> float:
    """Returns (target - mean) * sqrt(n), modded-nanogpt's statistic; see TRACK_3_SIGMAS."""
    return (target - float(np.mean(losses))) * math.sqrt(len(losses))


def first_reach(x: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Returns the x at which a curve first falls to the target, by linear interpolation.

    It is nan if the curve never falls so far.
    """
    i = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if i is None:
        return math.nan
    if i == 0 or not math.isfinite(losses[i - 1]):
        return float(x[i])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))

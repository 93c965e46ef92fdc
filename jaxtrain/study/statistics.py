"""What paired runs allow to be said: differences, their errors, and verdicts in plain words."""

import math
from typing import NamedTuple

import numpy as np
from scipy import special

FEWEST_PAIRS = 3  # fewer never make a winner
# modded-nanogpt's rule for its optimizer track: (target - mean) * sqrt(n) >= 0.004 at a run-to-run
# sigma of 0.0013, which is one-sided p = 0.001.
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


def mean_sd(losses) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); nan or inf where a loss is not finite."""
    losses = np.asarray(losses, float)
    if not np.isfinite(losses).all():
        return float(losses.mean()), math.nan
    return float(losses.mean()), float(losses.std(ddof=1)) if len(losses) > 1 else math.nan


def paired_test(losses, baseline) -> Paired:
    """Student's paired t-test of two equally long lists, one entry a seed.

    Losses that are not finite give a p of nan: a run that diverged is not a number to average.

    Raises:
        ValueError: the lists are empty or not equally long.
    """
    if len(losses) != len(baseline) or not len(losses):
        raise ValueError(f"pairs need two lists of a length; got {len(losses)}, {len(baseline)}.")
    if not np.isfinite([*losses, *baseline]).all():
        return Paired(len(losses), math.nan, math.nan, math.nan, math.nan)
    differences = np.asarray(losses, float) - np.asarray(baseline, float)
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Paired(n, mean, math.nan, math.nan, math.nan)
    se = float(differences.std(ddof=1)) / math.sqrt(n)
    if se == 0:  # equal differences: none at all, or one without error
        return Paired(n, mean, se, math.copysign(math.inf, mean) if mean else 0.0, float(not mean))
    t = mean / se
    return Paired(n, mean, se, t, float(2 * special.stdtr(n - 1, -abs(t))))


def holm(ps) -> list[float]:
    """p-values corrected for being several, in the order given; nan stays nan and counts.

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
    """The smallest mean difference that these pairs would have told from none, uncorrected."""
    if paired.pairs < 2:
        return math.nan
    return float(special.stdtrit(paired.pairs - 1, 1 - level / 2)) * paired.se


def judge(losses, baseline, p_corrected: float, level: float) -> str:
    """TIES, WINS, LOSES or UNDECIDED of a contender; with under 3 pairs always the last.

    A contender that diverges where the baseline does not loses, whatever its other seeds say.
    """
    if len(losses) < FEWEST_PAIRS or not np.isfinite(baseline).all():
        return UNDECIDED
    if not np.isfinite(losses).all():
        return LOSES
    if p_corrected > level:
        return TIES
    return WINS if np.mean(losses) < np.mean(baseline) else LOSES


def pooled_sd(groups) -> float:
    """Run-to-run sigma: the groups' variances, averaged by degrees of freedom; nan if none has."""
    spread = [np.asarray(g, float) for g in groups if len(g) > 1 and np.isfinite(g).all()]
    freedom = sum(len(g) - 1 for g in spread)
    if not freedom:
        return math.nan
    return math.sqrt(sum(((g - g.mean()) ** 2).sum() for g in spread) / freedom)


def track_3(losses, target: float) -> float:
    """(target - mean) * sqrt(n): how far below the target, weighed by the number of runs.

    Source: modded-nanogpt, as TRACK_3_SIGMAS.
    """
    return (target - float(np.mean(losses))) * math.sqrt(len(losses))


def reach(x, losses, target: float) -> float:
    """Where a curve first comes down to the target, by straight lines between its points.

    nan where it never does.
    """
    losses = [float(loss) for loss in losses]
    i = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if i is None:
        return math.nan
    if i == 0:
        return float(x[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    if not math.isfinite(share):  # a point that is not finite has no line to the next
        return float(x[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))

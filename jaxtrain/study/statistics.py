"""Compares paired runs: differences with their errors, corrected p-values, and verdicts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST_PAIRS = 3  # with fewer pairs there is no verdict
# modded-nanogpt's rule for its optimizer track: (target - mean) * sqrt(n) >= 0.004 at a run-to-run
# sigma of 0.0013, which is a one-sided p of 0.001.
# Source: https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization
TRACK_3_SIGMAS = 0.004 / 0.0013

UNEQUAL = 0.01

TIES, WINS, LOSES, UNDECIDED = "ties", "wins", "loses", "undecided"


class Paired(NamedTuple):
    """A contender against the baseline, seed by seed; negative differences are lower losses."""

    pairs: int
    difference: float  # mean of contender - baseline
    se: float  # standard error of the difference
    t: float
    p: float  # two-sided
    degrees: int  # of freedom of the standard error


def mean_sd(losses: Sequence[float]) -> tuple[float, float]:
    """Returns mean and sample standard deviation (n - 1); nan or inf if a loss is not finite."""
    values = np.asarray(losses, float)
    if len(values) < 2 or not np.isfinite(values).all():
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std(ddof=1))


def paired_tests(losses: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Paired]:
    """Returns each contender's test against the baseline, paired by seed.

    The losses of a seed share its data order and initial weights, so each is taken as the sum of
    an effect of its contender, an effect of its seed, and an error. The error's variance is
    pooled over all contenders whose losses are finite (the analysis of variance of randomised
    blocks). With two contenders this is Student's paired t-test; with more it has more degrees of
    freedom, but assumes that all contenders vary equally. A contender whose differences vary
    significantly more than those of the others (F test, p < UNEQUAL) gets its own paired t-test
    and is left out of the pool. A contender with a loss that is not finite, and every one if the
    baseline has such a loss, gets nan: a diverged run has no loss to average.

    Raises:
        ValueError: the contenders have no losses, or not equally many.
    """
    counts = {len(values) for values in losses.values()}
    if len(counts) != 1 or not min(counts):
        raise ValueError(
            "a paired test needs the same number of losses, 1 or more, of each contender; got "
            f"{', '.join(f'{name} {len(values)}' for name, values in losses.items())}."
        )
    n = counts.pop()
    finite = {name: np.array(v, float) for name, v in losses.items() if np.isfinite(v).all()}
    nothing = Paired(n, math.nan, math.nan, math.nan, math.nan, 0)
    if baseline not in finite:
        return dict.fromkeys(losses, nothing)
    differences = {name: values - finite[baseline] for name, values in finite.items()}
    uneven = {name for name in finite if _varies_more(name, finite, differences[name])}
    se, degrees = _pooled_error({name: finite[name] for name in finite if name not in uneven})
    tests = dict.fromkeys(losses, nothing)
    for name, values in differences.items():
        own = name in uneven
        error = (float(values.std(ddof=1)) / math.sqrt(n), n - 1) if own else (se, degrees)
        tests[name] = _t_test(float(values.mean()), error[0], n, error[1])
    return tests


def _pooled_error(losses: Mapping[str, np.ndarray]) -> tuple[float, int]:
    """Returns the standard error of a mean paired difference, and its degrees of freedom."""
    table = np.stack(list(losses.values()))  # contenders x seeds
    contenders, n = table.shape
    degrees, largest = (contenders - 1) * (n - 1), float(np.abs(table).max())
    if not degrees:
        return math.nan, 0
    table = table - table.mean(0)
    residuals = table - table.mean(1, keepdims=True)
    se = math.sqrt(2 * float((residuals**2).sum()) / degrees / n)
    return (se if se > 1e-14 * largest else 0.0), degrees  # less is rounding


def _varies_more(name: str, losses: Mapping[str, np.ndarray], differences: np.ndarray) -> bool:
    """Returns whether a contender's differences vary significantly more than those of others."""
    others = {other: values for other, values in losses.items() if other != name}
    if len(others) < 2 or not differences.any():
        return False
    se, degrees = _pooled_error(others)
    if not se > 0:
        return False
    ratio = float(differences.var(ddof=1)) / len(differences) / se**2
    return bool(stats.f.sf(ratio, len(differences) - 1, degrees) < UNEQUAL)


def _t_test(difference: float, se: float, n: int, degrees: int) -> Paired:
    if math.isnan(se):
        return Paired(n, difference, math.nan, math.nan, math.nan, degrees)
    if se == 0:  # all differences are equal, so they are certain
        t = math.copysign(math.inf, difference) if difference else 0.0
        return Paired(n, difference, se, t, 0.0 if difference else 1.0, degrees)
    t = difference / se
    return Paired(n, difference, se, t, float(2 * stats.t.sf(abs(t), degrees)), degrees)


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
    if paired.degrees < 1:
        return math.nan
    return float(stats.t.isf(level / 2, paired.degrees)) * paired.se


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

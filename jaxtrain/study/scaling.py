"""Estimates speed-ups in tokens from losses at several horizons, and how rankings agree.

Intervals are a parametric bootstrap over the seeds. With three seeds, drawing seeds with
replacement would give intervals that are far too narrow. So every mean is drawn again with its own
standard error, which is pooled over the contenders of its cell (statistics.paired_tests), from
Student's t with the degrees of freedom of that error.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxtrain.study.result import ConditionResult

REDRAWS = 4_000
MOST_PERMUTATIONS = 50_000  # of more, this many are drawn at random


class Speedup(NamedTuple):
    """How many times fewer tokens a contender needs than the baseline; keys of study.json.

    `low` and `high` bound the interval at 1 - study.level, which is not corrected for multiple
    comparisons.
    """

    condition: str
    contender: str
    ratio: float  # tokens that the baseline needs for the same loss, over the contender's tokens
    low: float
    high: float
    extrapolated: bool  # the loss is not between those that the baseline reached


class RankCorrelation(NamedTuple):
    """Kendall's tau-b between the study's ranking and a published one; keys of study.json."""

    condition: str  # "all" pools the cells by each contender's mean difference from the baseline
    contenders: list[str]  # from the lowest to the highest loss
    tau: float
    low: float
    high: float
    p: float  # two-sided, by permutation


def tokens_to_reach(loss: np.ndarray, tokens: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Returns the tokens at which a curve of end-of-run losses reaches a loss.

    Between two horizons the loss is taken as linear in the logarithm of the tokens; beyond the
    first and last horizon, their segments are continued. Losses fall ever more slowly with the
    logarithm, so beyond the last horizon this understates the tokens, and before the first one,
    too. It is nan where two neighbouring losses do not fall.

    Args:
        loss: [N]
        tokens: [P], rising, at least 2.
        curves: [N,P], the losses at the tokens.

    Returns: [N]
    """
    falls = np.diff(curves, axis=1) < 0
    # The last segment that starts above the loss; segment 0 if none does.
    segment = np.clip((curves > loss[:, None]).sum(1) - 1, 0, len(tokens) - 2)
    rows, x = np.arange(len(loss)), np.log(tokens)
    upper, lower = curves[rows, segment], curves[rows, segment + 1]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = (upper - loss) / (upper - lower)
        reached = np.exp(x[segment] + share * (x[segment + 1] - x[segment]))
    return np.where(falls.all(1), reached, math.nan)


def redraw_means(result: ConditionResult, redraws: int, seed: int) -> dict[str, np.ndarray]:
    """Returns contender -> [1 + redraws] mean losses: the measured one, then redrawn ones.

    The redrawn ones are nan if the study has too few seeds for an error, and all are inf for a
    contender that diverged.
    """
    pooled = result.contests[0].paired
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((len(result.contests), redraws))
    draw_scale = lambda degrees: np.sqrt(max(degrees, 1) / rng.chisquare(max(degrees, 1), redraws))
    shared_scale, variance = draw_scale(pooled.degrees), pooled.se**2 / 2
    means = {}
    for contest, noise in zip(result.contests, normal, strict=True):
        # The squared standard error of a difference is the sum of those of two means.
        own = max(contest.paired.se**2 - variance, 0.0)
        is_pooled = contest.paired.degrees == pooled.degrees
        scale = shared_scale if is_pooled else draw_scale(contest.paired.degrees)
        drawn = contest.mean + math.sqrt(own) * noise * scale
        means[contest.contender] = np.concatenate([[contest.mean], drawn])
    return means


def speedups(
    results: Sequence[ConditionResult], groups: Mapping[str, str], level: float
) -> list[Speedup]:
    """Returns every contender's speed-up in tokens over the baseline, in each cell.

    Cells that differ only in their horizon give the baseline's curve; a group of one cell has none.

    Args:
        groups: cell -> its condition and size.
        level: the intervals cover 1 - level.
    """
    found = []
    for group in dict.fromkeys(groups[result.condition] for result in results):
        cells = [result for result in results if groups[result.condition] == group]
        if len(cells) < 2:
            continue
        draws = [redraw_means(cell, REDRAWS, seed) for seed, cell in enumerate(cells)]
        baseline = cells[0].contests[0].contender
        tokens = np.array([cell.tokens for cell in cells], float)
        curves = np.stack([draw[baseline] for draw in draws], axis=1)
        for cell, draw in zip(cells, draws, strict=True):
            for contest in cell.contests[1:]:
                ratios = tokens_to_reach(draw[contest.contender], tokens, curves) / cell.tokens
                low, high = _interval(ratios[1:], level)
                inside = curves[0].min() <= contest.mean <= curves[0].max()
                found.append(
                    Speedup(
                        cell.condition, contest.contender, float(ratios[0]), low, high, not inside
                    )
                )
    return found


def rank_correlations(
    results: Sequence[ConditionResult], published: Mapping[str, float], level: float
) -> list[RankCorrelation]:
    """Returns Kendall's tau-b with a published ranking, for each cell and for all together.

    A contender that diverged ranks last.

    Args:
        published: contender -> a figure that is lower for better contenders, such as steps.
    """
    names = (
        [c.contender for c in results[0].contests if c.contender in published] if results else []
    )
    if len(names) < 3:
        return []
    steps = np.array([published[name] for name in names], float)
    found, pooled = [], []
    for seed, result in enumerate(results):
        draws = redraw_means(result, REDRAWS, seed)
        losses = np.stack([draws[name] for name in names], axis=1)  # [1+redraws,N]
        pooled.append(losses - draws[result.contests[0].contender][:, None])
        found.append(_correlate(result.condition, names, losses, steps, level))
    if len(results) > 1:
        found.append(_correlate("all", names, np.mean(pooled, axis=0), steps, level))
    return found


def _correlate(
    condition: str, names: list[str], losses: np.ndarray, steps: np.ndarray, level: float
) -> RankCorrelation:
    losses = np.where(np.isnan(losses), math.inf, losses)
    taus = kendall_tau(losses, steps)
    low, high = _interval(taus[1:], level) if np.isfinite(losses[1]).any() else (math.nan,) * 2
    order = [names[i] for i in np.argsort(losses[0], kind="stable")]
    return RankCorrelation(
        condition, order, float(taus[0]), low, high, permutation_p(losses[0], steps)
    )


def kendall_tau(rows: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns Kendall's tau-b of each row with y: [M,N], [N] -> [M]; nan if all are tied."""
    i, j = np.triu_indices(len(y), 1)
    compare = lambda x: (x[..., i] > x[..., j]).astype(int) - (x[..., i] < x[..., j])
    signs, y_signs = compare(rows), compare(y)
    with np.errstate(invalid="ignore"):
        return (signs * y_signs).sum(-1) / np.sqrt(np.abs(signs).sum(-1) * np.abs(y_signs).sum(-1))


def permutation_p(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the two-sided p of Kendall's tau-b, over all orders of y.

    Of more than MOST_PERMUTATIONS orders, that many are drawn at random.
    """
    if math.factorial(len(y)) <= MOST_PERMUTATIONS:
        orders = np.array(list(itertools.permutations(y)))
    else:
        orders = np.random.default_rng(0).permuted(np.tile(y, (MOST_PERMUTATIONS, 1)), axis=1)
    taus, observed = kendall_tau(orders, x), kendall_tau(y[None], x)
    return float(np.mean(np.abs(taus) >= np.abs(observed) - 1e-12))


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    if not np.isfinite(values).any():
        return math.nan, math.nan
    low, high = np.nanquantile(values, [level / 2, 1 - level / 2])
    return float(low), float(high)

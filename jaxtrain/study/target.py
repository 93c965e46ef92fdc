"""Finds the step at which a contender's runs reach a target loss, by modded-nanogpt's rules.

The optimizer track of modded-nanogpt ("track 3") counts steps to a held-out loss of 3.28. A set of
n runs has reached the target at a step if (target - mean) * sqrt(n) >= 0.004, where `mean` is the
mean held-out loss of all runs at that step. 0.004 is 3.09 times the track's run-to-run sigma of
0.0013, so that a one-sided z-test has p < 0.001. Runs may be evaluated at many steps near their
end, and the earliest step that passes may be chosen, if it is the same step for all runs: a
different stopping step for each run, chosen by its loss, is not allowed.

Source: https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization/README.md,
rules 3 and 5.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtrain.study.runs import Result
from jaxtrain.study.statistics import track_3


class TargetStep(NamedTuple):
    """The runs of a contender at one step, against the target."""

    step: int
    runs: int
    mean: float  # held-out nats/token
    statistic: float  # (target - mean) * sqrt(runs)


class TargetResult(NamedTuple):
    """When a contender's runs reached the target; these fields are keys of study.json."""

    contender: str
    reached: TargetStep | None  # at the earliest step that passes
    best: TargetStep | None  # at the step with the largest statistic; None without a shared step
    evaluated: int  # number of steps at which all runs were evaluated


def steps_to_target(
    contender: str, results: Sequence[Result], target: float, margin: float
) -> TargetResult:
    """Returns the earliest step at which a contender's runs, all together, have reached the target.

    Only steps at which every run was evaluated count. A run that diverged was evaluated at none
    of the later steps, so the contender reaches the target before that or not at all.

    Args:
        results: all runs of the contender: leaving one out by its loss would void the test.
        target: nats/token.
        margin: what (target - mean) * sqrt(runs) must be at least.
    """
    curves = [{step: loss for step, _, loss in result.held_out} for result in results]
    rows = []
    for step in sorted(set.intersection(*map(set, curves))) if curves else []:
        losses = [curve[step] for curve in curves]
        if all(map(math.isfinite, losses)):
            mean = sum(losses) / len(losses)
            rows.append(TargetStep(int(step), len(losses), mean, track_3(losses, target)))
    reached = next((row for row in rows if row.statistic >= margin), None)
    best = max(rows, key=lambda row: row.statistic, default=None)
    return TargetResult(contender, reached, best, len(rows))


def describe_target(result: TargetResult, target: float, margin: float) -> str:
    """Returns the result as a sentence."""
    name, row = result.contender, result.reached or result.best
    if row is None:
        return f"{name} does not reach {target:g}: its runs share no evaluated step"
    statistic = f"(target - mean) * sqrt(n) = {row.statistic:+.4f}"
    where = f"mean {row.mean:.4f} of n = {row.runs} runs, {statistic}"
    if result.reached:
        return (
            f"{name} reaches {target:g} at step {row.step:,}: {where} >= {margin:g}; the earliest "
            f"of {result.evaluated} evaluated steps, the same for all runs"
        )
    return f"{name} does not reach {target:g}: at its best step {row.step:,}, {where} < {margin:g}"

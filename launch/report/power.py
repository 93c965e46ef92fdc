"""Estimates what a check against a baseline can see: its false alarms and the slow-downs it finds.

Runs are simulated from the step times of the recorded ones: blocks of consecutive steps are drawn
again, and each simulated run is faster or slower by a random factor that varies as the recorded
runs do. Only figures of step times are simulated.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch.report.stats import resample, t_quantile

POOL, DRAWS = 200, 4_000  # simulated runs, and checks that pair them
SHARE = 0.9  # a slow-down counts as caught if this share of checks finds it
SLOWDOWNS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
WANTED = (0.05, 0.1)  # slow-downs for which the number of runs is estimated
COUNTS = (3, 4, 5, 6, 8, 10, 15, 20, 30)
UNKNOWN = 0.05  # differences between runs that are assumed where only one was recorded


class Timed(NamedTuple):
    """A figure of step times: how much its logarithm changes with that of a step time."""

    effect: int  # -1 for tokens/s, 0 for a ratio
    sign: int  # 1: more is better
    floor: float


def simulate_figures(times: Sequence[Sequence[float]], seed: int) -> np.ndarray:
    """Returns logarithms of tokens/s, p50, p95 and p99/p50 of POOL simulated runs, [POOL, 4].

    Each run's own speed is left out.
    """
    rng = random.Random(seed)
    level = [list(np.asarray(run) / np.exp(np.mean(np.log(run)))) for run in times]
    rows = []
    for i in range(POOL):
        steps = np.array(resample([level[i % len(level)]], rng)[0])
        p50, p95, p99 = np.quantile(steps, (0.5, 0.95, 0.99))
        rows.append((-math.log(steps.mean()), math.log(p50), math.log(p95), math.log(p99 / p50)))
    return np.array(rows)


def spread_between(times: Sequence[Sequence[float]], pool: np.ndarray) -> float | None:
    """Returns the standard deviation of the runs' speeds, relative; None for a single run.

    What the steps' own noise explains is subtracted.
    """
    if len(times) < 2:
        return None
    speeds = [math.log(np.mean(run)) for run in times]
    return math.sqrt(max(0.0, float(np.var(speeds, ddof=1) - pool[:, 0].var())))


class Simulation:
    """Simulated checks.

    Args:
        times: step times of each recorded run, s.
        figures: name -> Timed, for the figures that are enforced, a subset of tokens_per_s,
            step_p50_s, step_p95_s and step_p99_over_p50.
        between: standard deviation of the speeds of runs, relative.
        confidence: of the bounds.
    """

    NAMES = ("tokens_per_s", "step_p50_s", "step_p95_s", "step_p99_over_p50")

    def __init__(
        self,
        times: Sequence[Sequence[float]],
        figures: Mapping[str, Timed],
        confidence: float,
        blunt: float,
        seed: int = 0,
    ):
        self.figures, self._confidence, self._blunt = figures, confidence, blunt
        self._columns = [self.NAMES.index(name) for name in figures]
        self._pool, self._rng = simulate_figures(times, seed), np.random.default_rng(seed)
        self.between = spread_between(times, self._pool)

    def _draw(self, count: int, between: float) -> np.ndarray:
        """Returns the logarithms of the figures of simulated runs, [DRAWS, count, figures]."""
        index = self._rng.integers(POOL, size=(DRAWS, count))
        effects = np.array([figure.effect for figure in self.figures.values()])
        speeds = between * self._rng.standard_normal((DRAWS, count, 1))
        return self._pool[index][:, :, self._columns] + speeds * effects

    def breaches(
        self,
        count: int,
        slowdown: float,
        between: float,
        tolerances: Mapping[str, float] | None = None,
    ) -> float:
        """Returns the share of checks that report a breach.

        Args:
            count: runs of the baseline.
            slowdown: of the checked run, relative; 0 for an equal one.
            tolerances: relative, of the baseline; with None each simulated baseline has its own.
        """
        runs, checked = self._draw(count, between), self._draw(1, between)[:, 0]
        figures = list(self.figures.values())
        signs = np.array([figure.sign for figure in figures])
        effects = np.array([figure.effect for figure in figures])
        if tolerances is None:
            quantile = t_quantile(self._confidence, count - 1)
            width = quantile * runs.std(axis=1, ddof=1) * math.sqrt(1 + 1 / count)
            width = np.maximum(width, np.log1p([figure.floor for figure in figures]))
            width[width > math.log(self._blunt)] = np.inf  # not enforced
        else:
            width = np.log1p([tolerances[name] for name in self.figures])
        margin = signs * (checked + effects * math.log1p(slowdown) - runs.mean(axis=1)) + width
        return float((margin < 0).any(axis=1).mean())

    def least_caught(self, count: int, between: float, tolerances: Mapping[str, float]) -> float:
        """Returns the smallest of SLOWDOWNS that is caught; inf if none is."""
        caught = (s for s in SLOWDOWNS if self.breaches(count, s, between, tolerances) >= SHARE)
        return next(caught, math.inf)

    def runs_needed(self, slowdown: float, between: float) -> int | None:
        """Returns how many runs a baseline needs to catch a slow-down; None if over 30."""
        counts = (n for n in COUNTS if self.breaches(n, slowdown, between) >= SHARE)
        return next(counts, None)


def describe_detection(power: Mapping[str, Any]) -> str:
    """Returns which slow-down a check against a baseline reports, and how often by mistake."""
    caught, alarms = power["least_caught"], 100 * power["false_alarms"]
    found = f"a run that is {caught:.0%} slower" if caught else "no run, not even one 200% slower,"
    return f"{found} is reported 9 times of 10; of 100 equal runs {alarms:.1f} are, by mistake"


def describe_power(power: Mapping[str, Any]) -> list[str]:
    """Returns the sentences about a baseline's power, see launch.report.baseline.record."""
    if not power:
        return ["what a check can see is not estimated: no figure of the step times is enforced"]
    lines = [describe_detection(power)]
    if power["between"] is None:
        equal = 100 * power["false_alarms_if_unknown"]
        lines.append(
            "this leaves out differences between runs, which one run does not show: if they were "
            f"{UNKNOWN:.0%}, {equal:.0f} of 100 equal runs would breach"
        )
        return lines
    needed = [
        f"{float(slowdown):.0%} {f'{count} runs' if count else 'more than 30 runs'}"
        for slowdown, count in power["runs_needed"].items()
    ]
    lines.append(
        f"runs differ by {power['between']:.1%} (standard deviation); to report a slow-down 9 "
        f"times of 10, a baseline needs: {', '.join(needed)}"
    )
    return lines

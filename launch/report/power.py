"""Estimates what a check against a baseline can see: its false alarms and the slow-downs it finds.

Runs are simulated from the recorded ones: blocks of consecutive steps, and of the other values that
a figure is computed from, are drawn again, and each simulated run differs by random factors that
vary as the recorded runs do.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.report.run_folder import RunFolder
from launch.report.slo_figures import FIGURES, measure, series
from launch.report.stats import resample, t_quantile

POOL, DRAWS = 200, 4_000  # simulated runs, and checks that pair them
SHARE = 0.9  # a slow-down counts as caught if this share of checks finds it
SLOWDOWNS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
WANTED = (0.05, 0.1)  # slow-downs for which the number of runs is estimated
COUNTS = (3, 4, 5, 6, 8, 10, 15, 20, 30)
UNKNOWN = 0.05  # the spread of speeds that is assumed of fewer than LEAST_RUNS runs
LEAST_RUNS = 3  # to use the spread between runs; with two, Student's t is 32 standard deviations
BLUNT = 2.0  # a bound farther than this factor from its figure is too loose to enforce
LEAST_RATIO = 1e-9  # so that a figure of 0 has a logarithm


def confidence_of_each(confidence: float, figures: int) -> float:
    """Returns the confidence of each bound such that all hold together with `confidence`.

    Bonferroni's inequality: it holds however the figures depend on each other.
    Source: Dunn 1961, https://doi.org/10.1080/01621459.1961.10482090
    """
    return 1 - (1 - confidence) / figures


class Simulation:
    """Simulated checks.

    Args:
        runs: the recorded runs.
        names: the figures that are enforced.
        confidence: of all bounds together.

    Attributes:
        between: standard deviation of the runs' speeds, relative; 0 for a single run. What the
            steps' own noise explains is subtracted.
    """

    def __init__(
        self, runs: Sequence[RunFolder], names: Sequence[str], confidence: float, seed: int = 0
    ):
        self.names, figures = list(names), [FIGURES[name] for name in names]
        self._each = confidence_of_each(confidence, len(figures))
        self._effects = np.array([figure.effect for figure in figures])
        self._signs = np.array([figure.sign for figure in figures])
        self._floors = np.log1p([figure.floor for figure in figures])
        self._rng = np.random.default_rng(seed)
        pool = self._simulate_figures(runs, random.Random(seed))
        self._pool = pool[:, 1:]
        self.between, self._own = 0.0, np.zeros(len(figures))
        if len(runs) > 1:
            logs = np.array([self._measure(run) for run in runs])
            # How each figure differs between runs beyond what follows from their speeds.
            beyond = lambda x: np.hstack([x[:, :1], x[:, 1:] - x[:, :1] * self._effects])
            variances = beyond(logs).var(axis=0, ddof=1) - beyond(pool).var(axis=0)
            self.between, *own = np.sqrt(np.maximum(variances, 0)).tolist()
            self._own = np.array(own)

    def _measure(self, run: RunFolder, drawn: Mapping[str, list[float]] | None = None):
        """Returns logarithms of the mean step time and of each figure, [1 + figures].

        Args:
            drawn: {metric: values} that stand in for the run's own ones.
        """
        times = run.seconds if drawn is None else drawn.get("", [])
        found = [float(np.mean(times)) if times else 1.0]
        for name in self.names:
            values = drawn.get(FIGURES[name].metric) if drawn is not None else None
            found.append(measure(run, name, values) or 0.0)
        return np.log(np.maximum(found, LEAST_RATIO))

    def _simulate_figures(self, runs: Sequence[RunFolder], rng: random.Random) -> np.ndarray:
        """Returns what _measure does of POOL simulated runs, less each run's own level."""
        names, rows = {"": "tokens_per_s"} | {FIGURES[n].metric: n for n in self.names}, []
        values = [
            {metric: found for metric, name in names.items() if (found := series(run, name))}
            for run in runs
        ]
        levels = [self._measure(run, own) for run, own in zip(runs, values, strict=True)]
        for i in range(POOL):
            k = i % len(runs)
            drawn = {metric: resample([found], rng)[0] for metric, found in values[k].items()}
            rows.append(self._measure(runs[k], drawn) - levels[k])
        return np.array(rows)

    def _draw(self, count: int, between: float) -> np.ndarray:
        """Returns the logarithms of the figures of simulated runs, [DRAWS, count, figures]."""
        index = self._rng.integers(POOL, size=(DRAWS, count))
        speeds = between * self._rng.standard_normal((DRAWS, count, 1))
        logs = self._pool[index] + speeds * self._effects
        if self._own.any():
            logs += self._own * self._rng.standard_normal(logs.shape)
        return logs

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
            between: standard deviation of the speeds of runs, relative.
            tolerances: relative, of the baseline; with None each simulated baseline has its own.
        """
        runs, checked = self._draw(count, between), self._draw(1, between)[:, 0]
        if tolerances is None:
            quantile = t_quantile(self._each, count - 1)
            width = quantile * runs.std(axis=1, ddof=1) * math.sqrt(1 + 1 / count)
            width = np.maximum(width, self._floors)
            width[width > math.log(BLUNT)] = np.inf  # not enforced
        else:
            width = np.log1p([tolerances[name] for name in self.names])
        slower = checked + self._effects * math.log1p(slowdown)
        margin = self._signs * (slower - runs.mean(axis=1)) + width
        return float((margin < 0).any(axis=1).mean())

    def least_caught(
        self, count: int, between: float, tolerances: Mapping[str, float]
    ) -> float | None:
        """Returns the smallest of SLOWDOWNS that is caught; None if none is."""
        caught = (s for s in SLOWDOWNS if self.breaches(count, s, between, tolerances) >= SHARE)
        return next(caught, None)

    def runs_needed(self, slowdown: float, between: float) -> int | None:
        """Returns how many runs a baseline needs to catch a slow-down; None if over 30."""
        counts = (n for n in COUNTS if self.breaches(n, slowdown, between) >= SHARE)
        return next(counts, None)


def estimate_power(
    runs: Sequence[RunFolder], entries: Mapping[str, Mapping[str, Any]], confidence: float
) -> dict[str, Any]:
    """Returns what a check against a baseline can see.

    Args:
        entries: {figure: {"value", "bound"}} of the baseline; a bound may be None.
        confidence: of all bounds together.

    Returns:
        `figures`, how many are enforced; `between`, the standard deviation of the runs' speeds, and
        whether it is `assumed`, since so few runs do not show it; `false_alarms`, the share of
        equal runs that breach any bound; `least_caught`, the smallest slow-down that 9 of 10 checks
        find, None if they find none; `runs_needed` {slow-down: runs}, None if 30 are too few.
    """
    enforced = {name: e for name, e in entries.items() if e["bound"] is not None}
    simulation = Simulation(runs, list(enforced), confidence)
    tolerances = {k: (e["value"] / e["bound"]) ** FIGURES[k].sign - 1 for k, e in enforced.items()}
    assumed = len(runs) < LEAST_RUNS
    spread = max(UNKNOWN, simulation.between) if assumed else simulation.between
    # With three runs or more for baselines of as many other runs: this one's tolerance comes from
    # the same few runs as the spread, so it would seem to be right more often than it is.
    fixed = tolerances if assumed else None
    return {
        "figures": len(enforced),
        "between": spread,
        "assumed": assumed,
        "false_alarms": simulation.breaches(len(runs), 0.0, spread, fixed),
        "least_caught": simulation.least_caught(len(runs), spread, tolerances),
        "runs_needed": {str(s): simulation.runs_needed(s, spread) for s in WANTED},
    }


def describe_detection(power: Mapping[str, Any]) -> str:
    """Returns which slow-down a check against a baseline reports, and how often by mistake."""
    caught, alarms = power["least_caught"], 100 * power["false_alarms"]
    found = f"a run that is {caught:.0%} slower" if caught else "no run, not even one 200% slower,"
    if power["assumed"]:
        found = f"if runs differ by {power['between']:.0%} in speed (assumed), {found}"
    return (
        f"{found} is reported 9 times of 10; {alarms:.1f} of 100 equal runs are reported by "
        f"mistake, over all enforced figures together ({power['figures']})"
    )


def describe_power(power: Mapping[str, Any]) -> list[str]:
    """Returns the sentences about a baseline's power, see estimate_power."""
    needed = [
        f"{float(slowdown):.0%} {f'{count} runs' if count else 'more than 30 runs, if any suffice'}"
        for slowdown, count in power["runs_needed"].items()
    ]
    how = (
        f"assumed, as fewer than {LEAST_RUNS} runs do not show it"
        if power["assumed"]
        else "measured"
    )
    return [
        describe_detection(power),
        f"runs differ by {power['between']:.1%} in speed (standard deviation, {how}); to report a "
        f"slow-down 9 times of 10, a baseline needs: {', '.join(needed)}",
    ]

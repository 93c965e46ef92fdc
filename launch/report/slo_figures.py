"""The figures of a run that a baseline records, and how each is measured."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from launch.report.formats import digits, grouped, percent, rate, seconds
from launch.report.run_folder import GOODPUT, RunFolder
from launch.report.stats import percentile

BEYOND = 10  # steps at or above a percentile; with fewer it is not reproducible
LEAST_S = 1e-9  # the shortest step time that a clock can have measured


class Figure(NamedTuple):
    """One figure of a run, reduced from the values of a metric.

    `floor` is the least tolerance, relative to the figure. Runs that happen to agree better, as in
    their peak of memory, must not make 512 bytes more a breach. `effect` is how much the figure's
    logarithm changes with that of the step times: effective bandwidth is bytes over step time.
    """

    words: str
    sign: int  # 1: more is better; -1: less is better
    form: Callable[[float], str]
    metric: str  # "" for step times
    reduce: Callable[[list[float]], float]
    floor: float
    effect: int = 0
    tail: float = 0.0  # the highest percentile that the figure uses


FIGURES = {
    "tokens_per_s": Figure("tokens/s", 1, grouped, "", lambda t: 1 / fmean(t), 0.01, -1),
    "step_p50_s": Figure("step p50", -1, seconds, "", lambda t: percentile(t, 0.5), 0.01, 1),
    "step_p95_s": Figure(
        "step p95", -1, seconds, "", lambda t: percentile(t, 0.95), 0.02, 1, tail=0.95
    ),
    "step_p99_over_p50": Figure(
        "step p99/p50",
        -1,
        digits,
        "",
        lambda t: percentile(t, 0.99) / percentile(t, 0.5),
        0.05,
        tail=0.99,
    ),
    "effective_bytes_per_s": Figure(
        "effective bandwidth", 1, rate, "comm/effective_bytes_per_s", fmean, 0.02, -1
    ),
    "hbm_headroom": Figure("HBM headroom", 1, percent, "perf/hbm_peak_bytes", max, 0.01),
    "goodput": Figure("goodput", 1, percent, GOODPUT, fmean, 0.01),
}


def measure(run: RunFolder, name: str, values: list[float] | None = None) -> float | None:
    """Returns a run's figure, from all values or from the given ones; None if there are none."""
    figure = FIGURES[name]
    if name == "goodput" and values is None:
        return run.figures.get(GOODPUT)
    values = series(run, name) if values is None else values
    if not values:
        return None
    value = figure.reduce(values)
    if name == "tokens_per_s":
        return run.tokens_per_step * value
    if name == "hbm_headroom" and run.chip:
        return 1 - value / run.chip["hbm_bytes"]
    return value


def series(run: RunFolder, name: str) -> list[float]:
    """Returns the values that a figure is computed from, in order.

    Raises:
        ValueError: a step time is not positive, so no step was timed.
    """
    metric = FIGURES[name].metric
    if not metric:
        if run.seconds and min(run.seconds) < LEAST_S:
            raise ValueError(
                f"{run.folder} must have positive step times; got {min(run.seconds):g} s."
            )
        return run.seconds
    if name == "hbm_headroom" and not run.chip:
        return []
    return [value for _, value in run.points(metric)]


def too_few(run: RunFolder, name: str) -> str:
    """Returns why a percentile of a run does not predict the next run; "" if it does."""
    share, steps = FIGURES[name].tail, len(run.seconds)
    beyond = steps - math.floor(share * (steps - 1))
    if not share or beyond >= BEYOND:
        return ""
    return f"{beyond} steps at or above p{100 * share:.0f} in {run.name}, {BEYOND} are needed"

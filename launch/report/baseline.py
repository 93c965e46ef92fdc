"""Records a cluster's figures with their spread as a baseline, and checks runs against it."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from launch.report.formats import digits, grouped, percent, rate, seconds
from launch.report.power import UNKNOWN, WANTED, Simulation, Timed
from launch.report.run_folder import GOODPUT, RunFolder
from launch.report.stats import percentile, split, t_quantile

VERSION = 1
BLOCKS, STEPS_PER_BLOCK, LEAST_BLOCKS = 10, 5, 3
BEYOND = 10  # steps at or above a percentile; with fewer it is not reproducible
SLACK = 1e-9  # relative; sums in another order round differently
# States in a check's JSON: the baseline has no bound; the run has too few steps for its percentile
NOT_ENFORCED, NOT_JUDGED = "not held", "not judged"
KEYS = ("config_hash", "device", "devices", "hosts", "processes", "versions")
LEAST_RUNS = 3  # to use the spread between runs; with two, Student's t is 32 standard deviations
LEAST_S = 1e-9  # the shortest step time that a clock can have measured
BLUNT = 2.0  # a bound farther than this factor from its figure is too loose to enforce
LOOSE = 0.2  # a relative tolerance above this would miss what an operator must see


class Figure(NamedTuple):
    """One figure of a run, reduced from the values of a metric.

    `floor` is the least tolerance, relative to the figure. Runs that happen to agree better, as in
    their peak of memory, must not make 512 bytes more a breach.
    """

    words: str
    sign: int  # 1: more is better; -1: less is better
    form: Callable[[float], str]
    metric: str  # "" for step times
    reduce: Callable[[list[float]], float]
    floor: float
    tail: float = 0.0  # the highest percentile that the figure uses


FIGURES = {
    "tokens_per_s": Figure("tokens/s", 1, grouped, "", lambda t: 1 / fmean(t), 0.01),
    "step_p50_s": Figure("step p50", -1, seconds, "", lambda t: percentile(t, 0.5), 0.01),
    "step_p95_s": Figure("step p95", -1, seconds, "", lambda t: percentile(t, 0.95), 0.02, 0.95),
    "step_p99_over_p50": Figure(
        "step p99/p50",
        -1,
        digits,
        "",
        lambda t: percentile(t, 0.99) / percentile(t, 0.5),
        0.05,
        0.99,
    ),
    "effective_bytes_per_s": Figure(
        "effective bandwidth", 1, rate, "comm/effective_bytes_per_s", fmean, 0.02
    ),
    "hbm_headroom": Figure("HBM headroom", 1, percent, "perf/hbm_peak_bytes", max, 0.01),
    "goodput": Figure("goodput", 1, percent, GOODPUT, fmean, 0.01),
}


def key_of(run: RunFolder) -> dict:
    """Returns what must be equal for a baseline to apply to a run."""
    return {
        "config_hash": run.config_hash,
        "device": run.device,
        "devices": run.devices,
        "hosts": run.hosts_count,
        "processes": run.processes,
        "versions": run.versions,
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


def record(runs: list[RunFolder], confidence: float) -> dict:
    """Returns a baseline of runs with the same key.

    A figure's bound is a one-sided prediction bound for one more run, by Student's t on the
    figure's logarithm, and at least the figure's floor away from it. With fewer than LEAST_RUNS
    runs the spread between blocks of their steps stands in for the spread between runs.
    Source: Hahn & Meeker 1991, Statistical Intervals, chapter 4.

    Raises:
        ValueError: a run is given twice, or the runs have different keys, are too short to show a
            spread, or differ too much for any bound.
    """
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        twice = next(run.name for i, run in enumerate(runs) if folders[i] in folders[:i])
        raise ValueError(f"each RUN must be given once; got {twice} twice. Its spread would be 0.")
    key = key_of(runs[0])
    for run in runs[1:]:
        differing = [name for name in KEYS if key_of(run)[name] != key[name]]
        if differing:
            raise ValueError(
                f"RUNs must have the same config, chip, hosts and versions; {runs[0].name} and "
                f"{run.name} differ in {', '.join(differing)}. Record them separately."
            )
    figures = {}
    for name in FIGURES:
        values = [value for run in runs if (value := measure(run, name)) is not None]
        if len(values) == len(runs):
            figures[name] = {"value": fmean(values)} | _bound(runs, name, values, confidence)
    if all(figure["bound"] is None for figure in figures.values()):
        why = "; ".join(f"{name}: {figure['how']}" for name, figure in figures.items())
        raise ValueError(
            f"a baseline must have at least one bound; got {why}. Give longer or more RUNs."
        )
    first = runs[0]
    return {
        "version": VERSION,
        "power": _estimate_power(runs, figures, confidence),
        "key": key,
        "figures": figures,
        "confidence": confidence,
        "runs": [run.name for run in runs],
        "provisional": len(runs) == 1,
        "steps": [len(run.seconds) for run in runs],
        "tokens_per_step": first.tokens_per_step,
        "params": first.work.get("params"),
        "recorded": time.time(),
    }


def _estimate_power(runs: list[RunFolder], figures: dict, confidence: float) -> dict[str, Any]:
    """Returns what a check against these bounds can see; {} if no step time has a bound.

    `false_alarms` is the share of equal runs that breach, over all figures of step times together;
    `least_caught` the smallest slow-down that 9 of 10 checks find, None if they find none;
    `between` the standard deviation of the runs' speeds; `runs_needed` {slow-down: runs}.
    """
    effects = {"tokens_per_s": -1, "step_p50_s": 1, "step_p95_s": 1, "step_p99_over_p50": 0}
    enforced = {k: e for k, e in figures.items() if k in effects and e["bound"] is not None}
    if not enforced:
        return {}
    timed = {k: Timed(effects[k], FIGURES[k].sign, FIGURES[k].floor) for k in enforced}
    simulation = Simulation([run.seconds for run in runs], timed, confidence, BLUNT)
    tolerances = {k: (e["value"] / e["bound"]) ** FIGURES[k].sign - 1 for k, e in enforced.items()}
    between = simulation.between
    spread = 0.0 if between is None else between
    least = simulation.least_caught(len(runs), spread, tolerances)
    # With three runs or more for baselines of as many other runs: this one's tolerance comes from
    # the same few runs as the spread, so it would seem to be right more often than it is.
    fixed = tolerances if len(runs) < LEAST_RUNS else None
    power = {
        "between": between,
        "false_alarms": simulation.breaches(len(runs), 0.0, spread, fixed),
        "least_caught": least if math.isfinite(least) else None,
    }
    if between is None:
        equal = simulation.breaches(1, 0.0, UNKNOWN, tolerances)
        return power | {"false_alarms_if_unknown": equal}
    return power | {"runs_needed": {str(s): simulation.runs_needed(s, spread) for s in WANTED}}


def too_few(run: RunFolder, name: str) -> str:
    """Returns why a percentile of a run does not predict the next run; "" if it does."""
    share, steps = FIGURES[name].tail, len(run.seconds)
    beyond = steps - math.floor(share * (steps - 1))
    if not share or beyond >= BEYOND:
        return ""
    return f"{beyond} steps at or above p{100 * share:.0f} in {run.name}, {BEYOND} are needed"


def _bound(runs, name, values, confidence) -> dict:
    """Returns {"bound", "how"}. The bound is None if it cannot be derived; `how` then says why."""
    few = [why for run in runs if (why := too_few(run, name))]
    if few:
        return {"bound": None, "how": few[0]}
    samples, how = (values, f"spread of {len(runs)} runs")
    if len(runs) < LEAST_RUNS:
        samples, how = _blocks(runs, name)
    if len(samples) < LEAST_BLOCKS:
        return {"bound": None, "how": "too few values to estimate a spread"}
    if min(samples) <= 0:
        return {"bound": None, "how": f"{how}, with a value of {min(samples):g}"}
    n, sign = len(samples), FIGURES[name].sign
    spread = stdev(math.log(sample) for sample in samples)
    factor = math.exp(t_quantile(confidence, n - 1) * spread * math.sqrt(1 + 1 / n))
    if factor < 1 + FIGURES[name].floor:
        factor, how = 1 + FIGURES[name].floor, f"{how}, raised to the floor"
    if factor > BLUNT:
        return {"bound": None, "how": f"{how}: a factor of {factor:.3g} is too loose to enforce"}
    return {"bound": fmean(values) * factor**-sign, "how": how}


def _blocks(runs, name) -> tuple[list[float], str]:
    """Returns a figure of each block of every run's steps, and their description."""
    samples, metric = [], FIGURES[name].metric
    for run in runs:
        run_values = series(run, name)
        count = min(BLOCKS, len(run_values) // STEPS_PER_BLOCK)
        if count < LEAST_BLOCKS and not metric:
            least = LEAST_BLOCKS * STEPS_PER_BLOCK
            raise ValueError(
                f"{run.folder} must have {least} step times or more to show a spread; got "
                f"{len(run_values)}. Give a longer RUN, or {LEAST_RUNS} RUNs."
            )
        if count >= LEAST_BLOCKS:
            samples += [measure(run, name, block) for block in split(run_values, count)]
    source = "the run" if len(runs) == 1 else f"{len(runs)} runs"
    return samples, f"spread of {len(samples)} blocks of {source}"


def refusals(baseline: dict, run: RunFolder, across: Sequence[str] = ()) -> list[str]:
    """Returns reasons why the run is not comparable with the baseline.

    Args:
        across: names in KEYS that may differ.
    """
    found, key = key_of(run), baseline["key"]
    return [
        f"{name}: the baseline has {key[name]}, {run.name} has {found[name]}"
        for name in KEYS
        if key[name] != found[name] and name not in across
    ]


def check(baseline: dict, run: RunFolder) -> list[dict]:
    """Returns a row per figure: {"figure", "baseline", "bound", "run", "margin", "state"}.

    `margin` is how far the run is on the good side of its bound, relative to the bound. `state`
    is ok, BREACH, NOT_ENFORCED or NOT_JUDGED; `how` gives the reason of the last two. A figure that
    the run did not measure is a breach.
    """
    rows = []
    for name, entry in baseline["figures"].items():
        value, bound, sign = measure(run, name), entry["bound"], FIGURES[name].sign
        row = {"figure": name, "baseline": entry["value"], "bound": bound, "run": value}
        row |= {"margin": None, "state": NOT_ENFORCED, "how": entry["how"]}
        if bound is None:
            pass
        elif value is None:
            row["state"] = "BREACH"
        elif few := too_few(run, name):
            row |= {"state": NOT_JUDGED, "how": few}
        else:
            row["margin"] = sign * (value / bound - 1)
            row["state"] = "ok" if row["margin"] >= -SLACK else "BREACH"
        rows.append(row)
    return rows

"""Service baselines: a cluster's figures with their spread, for checking later runs."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from launch.report.figures import grouped, percent, rate, seconds
from launch.report.run_folder import RunFolder
from launch.report.stats import deviation, mean, percentile, split, t_quantile
from launch.report.svg import digits

VERSION = 1
BLOCKS, STEPS_PER_BLOCK, LEAST_BLOCKS = 10, 5, 3
BEYOND = 10  # steps at or above a percentile; with fewer it is not reproducible
SLACK = 1e-9  # relative; sums in another order round differently
KEYS = ("config_hash", "device", "devices", "hosts", "processes", "versions")
LEAST_RUNS = 3  # to use the spread between runs; for two, Student's t is 32 spreads
BLUNT = 2.0  # a bound farther than this factor from its figure is too loose to enforce
LOOSE = 0.2  # a tolerance beyond this share of its figure would miss what an operator must see


class Figure(NamedTuple):
    """A figure of `metric` ("" for step times); `tail` is the highest percentile in it."""

    words: str
    sign: int  # 1: more is better
    form: Callable[[float], str]
    metric: str
    reduce: Callable[[list[float]], float]
    tail: float = 0.0


FIGURES = {
    "tokens_per_s": Figure("tokens/s", 1, grouped, "", lambda t: 1 / mean(t)),
    "step_p50_s": Figure("step p50", -1, seconds, "", lambda t: percentile(t, 0.5)),
    "step_p95_s": Figure("step p95", -1, seconds, "", lambda t: percentile(t, 0.95), 0.95),
    "step_p99_over_p50": Figure(
        "step p99/p50", -1, digits, "", lambda t: percentile(t, 0.99) / percentile(t, 0.5), 0.99
    ),
    "effective_bytes_per_s": Figure(
        "effective bandwidth", 1, rate, "comm/effective_bytes_per_s", mean
    ),
    "hbm_headroom": Figure("HBM headroom", 1, percent, "perf/hbm_peak_bytes", max),
    "goodput": Figure("goodput", 1, percent, "perf/goodput", mean),
}


def key_of(run: RunFolder) -> dict:
    """Returns what must be equal for a baseline to apply to a run."""
    return {
        "config_hash": run.config["config_hash"],
        "device": run.device,
        "devices": run.devices,
        "hosts": run.hosts_count,
        "processes": run.config.get("processes", 1),
        "versions": run.config["versions"],
    }


def measure(run: RunFolder, name: str, values=None) -> float | None:
    """Returns a run's figure, or the figure of some of its values; None if there are none."""
    figure = FIGURES[name]
    if name == "goodput" and values is None:
        return run.figures.get("perf/goodput")
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
    """Returns the values that a figure is computed from, in order."""
    metric = FIGURES[name].metric
    if not metric:
        return [value for _, value in run.step_times[0]]
    if name == "hbm_headroom" and not run.chip:
        return []
    return [value for _, value in run.points(metric)]


def record(runs: list[RunFolder], confidence: float) -> dict:
    """Returns a baseline of runs with the same key.

    A figure's bound is the one-sided prediction bound of one more run, by Student's t on its
    logarithm. The spread is that between the runs. With fewer than LEAST_RUNS it is that between
    blocks of their steps, as if runs differed from each other as blocks do.
    Source: Hahn & Meeker 1991, Statistical Intervals, chapter 4.

    Raises:
        ValueError: the runs have different keys, are too short to show a spread, or differ too
            much for any bound.
    """
    key = key_of(runs[0])
    for run in runs[1:]:
        differing = [name for name in KEYS if key_of(run)[name] != key[name]]
        if differing:
            raise ValueError(
                f"RUNs must be of one config, chip, hosts and versions; {runs[0].name} and "
                f"{run.name} differ in {', '.join(differing)}. Record them apart."
            )
    figures = {}
    for name in FIGURES:
        values = [value for run in runs if (value := measure(run, name)) is not None]
        if len(values) == len(runs):
            figures[name] = {"value": mean(values)} | _bound(runs, name, values, confidence)
    if all(figure["bound"] is None for figure in figures.values()):
        why = "; ".join(f"{name}: {figure['how']}" for name, figure in figures.items())
        raise ValueError(f"a baseline must have a bound; got {why}. Give longer or more RUNs.")
    first = runs[0]
    return {
        "version": VERSION,
        "key": key,
        "figures": figures,
        "confidence": confidence,
        "runs": [run.name for run in runs],
        "steps": [len(run.step_times[0]) for run in runs],
        "tokens_per_step": first.tokens_per_step,
        "params": first.work.get("params"),
        "recorded": time.time(),
    }


def too_few(run: RunFolder, name: str) -> str:
    """Returns why a percentile of a run does not predict the next run; "" if it does."""
    share, steps = FIGURES[name].tail, len(run.step_times[0])
    beyond = steps - math.floor(share * (steps - 1))
    if not share or beyond >= BEYOND:
        return ""
    return f"{beyond} steps at or above p{100 * share:.0f} in {run.name}, {BEYOND} are needed"


def _bound(runs, name, values, confidence) -> dict:
    """Returns {"bound", "how"}; the bound is None if the runs show no spread to derive it from."""
    few = [why for run in runs if (why := too_few(run, name))]
    if few:
        return {"bound": None, "how": few[0]}
    samples, how = (values, f"spread of {len(runs)} runs")
    if len(runs) < LEAST_RUNS:
        samples, how = _blocks(runs, name)
    if len(samples) < LEAST_BLOCKS:
        return {"bound": None, "how": "one value: no spread to see"}
    if min(samples) <= 0:
        return {"bound": None, "how": f"{how}, which reaches {min(samples):g}"}
    n, sign = len(samples), FIGURES[name].sign
    spread = deviation([math.log(sample) for sample in samples])
    factor = math.exp(t_quantile(confidence, n - 1) * spread * math.sqrt(1 + 1 / n))
    if factor > BLUNT:
        return {"bound": None, "how": f"{how}: {factor:.3g} times as much is too loose to enforce"}
    return {"bound": mean(values) * factor**-sign, "how": how}


def _blocks(runs, name) -> tuple[list[float], str]:
    """Returns a figure of each part of every run, and a description of them."""
    samples, metric = [], FIGURES[name].metric
    for run in runs:
        parts = series(run, name)
        count = min(BLOCKS, len(parts) // STEPS_PER_BLOCK)
        if count < LEAST_BLOCKS and not metric:
            least = LEAST_BLOCKS * STEPS_PER_BLOCK
            raise ValueError(
                f"{run.folder} must have {least} step times or more to show a spread; got "
                f"{len(parts)}. Give a longer RUN, or {LEAST_RUNS} of them."
            )
        if count >= LEAST_BLOCKS:
            samples += [measure(run, name, part) for part in split(parts, count)]
    whose = "the run" if len(runs) == 1 else f"{len(runs)} runs"
    return samples, f"spread of {len(samples)} blocks of {whose}"


def refusals(baseline: dict, run: RunFolder, across=()) -> list[str]:
    """Returns reasons why the run is not comparable with the baseline."""
    found, key = key_of(run), baseline["key"]
    return [
        f"{name}: the baseline is of {key[name]}, {run.name} of {found[name]}"
        for name in KEYS
        if key[name] != found[name] and name not in across
    ]


def check(baseline: dict, run: RunFolder) -> list[dict]:
    """Returns a row per figure: {"figure", "baseline", "bound", "run", "margin", "state"}.

    `margin` is how far the run is on the good side of its bound, relative to the bound; `state`
    is ok, BREACH, or "not held", with the reason as `how`. A figure that the run did not measure
    is a breach.
    """
    rows = []
    for name, held in baseline["figures"].items():
        value, sign = measure(run, name), FIGURES[name].sign
        row = {"figure": name, "baseline": held["value"], "bound": held["bound"], "run": value}
        row |= {"margin": None, "state": "not held", "how": held["how"]}
        few = too_few(run, name)
        if few:
            row["how"] = few
        elif held["bound"] is not None:
            within = value is not None and sign * (value / held["bound"] - 1) >= -SLACK
            row["state"] = "ok" if within else "BREACH"
            if value is not None:
                row["margin"] = sign * (value / held["bound"] - 1)
        rows.append(row)
    return rows

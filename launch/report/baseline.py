"""Service baselines: what a cluster did, with the spread that it showed, and runs held to it."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from launch.report.figures import grouped, percent, rate, seconds
from launch.report.run_folder import Run
from launch.report.stats import deviation, mean, percentile, split, t_quantile
from launch.report.svg import digits

VERSION = 1
BLOCKS, STEPS_PER_BLOCK, LEAST_BLOCKS = 10, 5, 3
BEYOND = 10  # steps at or above a percentile; fewer are an accident that the next run has not
SLACK = 1e-9  # of a figure: the rounding of sums in another order
KEYS = ("config_hash", "device", "devices", "hosts", "processes", "versions")
LEAST_RUNS = 3  # whose own spread is taken; Student's t of two runs is 32 of their spreads
BLUNT = 2.0  # a bound farther than this many times from its figure holds nothing
LOOSE = 0.2  # a tolerance beyond this share of its figure would miss what an operator must see


class Figure(NamedTuple):
    """`metric` is what it is made of, "" of step times; `tail` is its highest percentile."""

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


def key_of(run: Run) -> dict:
    """What a baseline is valid for."""
    return {
        "config_hash": run.config["config_hash"],
        "device": run.device,
        "devices": run.devices,
        "hosts": run.hosts_count,
        "processes": run.config.get("processes", 1),
        "versions": run.config["versions"],
    }


def measure(run: Run, name: str, values=None) -> float | None:
    """A figure of a run, or of some of the values that it is made of; None where there are none."""
    figure = FIGURES[name]
    if name == "goodput" and values is None:
        return run.figures.get("perf/goodput")
    values = series(run, name) if values is None else values
    if not values:
        return None
    value = figure.reduce(values)
    if name == "tokens_per_s":
        return run.tokens_per_step * value
    return 1 - value / run.chip["hbm_bytes"] if name == "hbm_headroom" else value


def series(run: Run, name: str) -> list[float]:
    """What a figure is made of, in order."""
    metric = FIGURES[name].metric
    if not metric:
        return [value for _, value in run.step_times[0]]
    if name == "hbm_headroom" and not run.chip:
        return []
    return [value for _, value in run.points(metric)]


def record(runs: list[Run], confidence: float) -> dict:
    """A baseline of runs of one key.

    A figure's bound is the one-sided prediction bound, by Student's t on its logarithm, of one more
    run: from the figure's spread between the runs, or with fewer than LEAST_RUNS between blocks of
    all their steps, as if the next run were as unlike these as a block is unlike another.
    Source: Hahn & Meeker 1991, Statistical Intervals, chapter 4.

    Raises:
        ValueError: the runs are of several keys, too short to show a spread, or too unlike to hold
            another to.
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
        values = [measure(run, name) for run in runs]
        if None not in values:
            figures[name] = {"value": mean(values)} | _bound(runs, name, values, confidence)
    if all(held["bound"] is None for held in figures.values()):
        why = "; ".join(f"{name}: {held['how']}" for name, held in figures.items())
        raise ValueError(f"a baseline must hold something; got {why}. Give longer or more RUNs.")
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


def too_few(run: Run, name: str) -> str:
    """Why a percentile of a run tells nothing of the next; "" where it does."""
    share, steps = FIGURES[name].tail, len(run.step_times[0])
    beyond = steps - math.floor(share * (steps - 1))
    if not share or beyond >= BEYOND:
        return ""
    return f"{beyond} steps at or above p{100 * share:.0f} in {run.name}, {BEYOND} are needed"


def _bound(runs, name, values, confidence) -> dict:
    """{"bound", "how"}; a bound of None where no spread can be seen, so that nothing is held."""
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
        return {"bound": None, "how": f"{how}: {factor:.3g} times as much is too wide to hold"}
    return {"bound": mean(values) * factor**-sign, "how": how}


def _blocks(runs, name) -> tuple[list[float], str]:
    """A figure of each part of every run, and what they are called."""
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


def refusals(baseline: dict, run: Run, across=()) -> list[str]:
    """In what the run is not what the baseline is of."""
    found, key = key_of(run), baseline["key"]
    return [
        f"{name}: the baseline is of {key[name]}, {run.name} of {found[name]}"
        for name in KEYS
        if key[name] != found[name] and name not in across
    ]


def check(baseline: dict, run: Run) -> list[dict]:
    """A row a figure: {"figure", "baseline", "bound", "run", "margin", "state"}.

    `margin` is how far the run is on the good side of its bound, as a share of the bound; `state`
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

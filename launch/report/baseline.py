"""Records a cluster's figures with their spread as a baseline, and checks runs against it."""

import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from launch.report.power import BLUNT, LEAST_RUNS, confidence_of_each, estimate_power
from launch.report.run_folder import RunFolder
from launch.report.slo_figures import FIGURES, measure, series, too_few
from launch.report.stats import split, t_quantile

VERSION = 2  # in version 1 bounds were not adjusted to the number of figures
BLOCKS, STEPS_PER_BLOCK, LEAST_BLOCKS = 10, 5, 3
SLACK = 1e-9  # relative; sums in another order round differently
# States in a check's JSON: the baseline has no bound; the run has too few steps for its percentile
NOT_ENFORCED, NOT_JUDGED = "not enforced", "not judged"
KEYS = ("config_hash", "device", "devices", "hosts", "processes", "versions")


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


def record(runs: list[RunFolder], confidence: float) -> dict:
    """Returns a baseline of runs with the same key.

    A figure's bound is a one-sided prediction bound for one more run, by Student's t on the
    figure's logarithm, and at least the figure's floor away from it. With fewer than LEAST_RUNS
    runs the spread between blocks of their steps stands in for the spread between runs.
    Source: Hahn & Meeker 1991, Statistical Intervals, chapter 4.

    Args:
        confidence: that one more run meets all bounds together, see confidence_of_each.

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
    values = {}
    for name in FIGURES:
        found = [value for run in runs if (value := measure(run, name)) is not None]
        if len(found) == len(runs):
            values[name] = found
    bounds = _find_bounds(runs, values, confidence)
    figures = {name: {"value": fmean(found)} | bounds[name] for name, found in values.items()}
    if all(figure["bound"] is None for figure in figures.values()):
        why = "; ".join(f"{name}: {figure['how']}" for name, figure in figures.items())
        raise ValueError(
            f"a baseline must have at least one bound; got {why}. Give longer or more RUNs."
        )
    first = runs[0]
    return {
        "version": VERSION,
        "power": estimate_power(runs, figures, confidence),
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


def _find_bounds(runs, values: Mapping[str, list[float]], confidence: float) -> dict[str, dict]:
    """Returns {figure: {"bound", "how"}}. A bound is None if it cannot be derived; `how` says why.

    Figures that are too loose to enforce are left out one by one, the loosest first, because each
    one less narrows the others.
    """
    samples = {name: _find_samples(runs, name, values[name]) for name in values}
    bounds = {name: {"bound": None, "how": how} for name, (found, how) in samples.items()}
    names = [name for name, (found, _) in samples.items() if found]
    while names:
        each = confidence_of_each(confidence, len(names))
        factors = {name: _prediction_factor(samples[name][0], each) for name in names}
        loosest = max(names, key=factors.__getitem__)
        if factors[loosest] <= BLUNT:
            break
        bounds[loosest]["how"] += f": a factor of {factors[loosest]:.3g} is too loose to enforce"
        names.remove(loosest)
    for name in names:
        figure, factor = FIGURES[name], factors[name]
        if factor < 1 + figure.floor:
            factor = 1 + figure.floor
            bounds[name]["how"] += ", raised to the floor"
        bounds[name]["bound"] = fmean(values[name]) * factor**-figure.sign
    return bounds


def _prediction_factor(samples: list[float], confidence: float) -> float:
    n, spread = len(samples), stdev(math.log(sample) for sample in samples)
    return math.exp(t_quantile(confidence, n - 1) * spread * math.sqrt(1 + 1 / n))


def _find_samples(runs, name: str, values: list[float]) -> tuple[list[float], str]:
    """Returns what shows a figure's spread and its description, or [] and why there is nothing."""
    few = [why for run in runs if (why := too_few(run, name))]
    if few:
        return [], few[0]
    samples, how = (values, f"spread of {len(runs)} runs")
    if len(runs) < LEAST_RUNS:
        samples, how = _blocks(runs, name)
    if len(samples) < LEAST_BLOCKS:
        return [], "too few values to estimate a spread"
    if min(samples) <= 0:
        return [], f"{how}, with a value of {min(samples):g}"
    return samples, how


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

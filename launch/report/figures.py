"""Formats a run's figures as rows of text, for both the terminal and the page."""

from statistics import fmean

from launch.host.run_files import ROUNDS
from launch.report.formats import duration, duration_or_ms, grouped, percent, rate, seconds, size
from launch.report.json_files import read_json_lines
from launch.report.run_folder import (
    DATA_WAIT,
    EVAL_LOSS,
    GOODPUT,
    LOSS,
    PROBE,
    STEP_TIME,
    RunFolder,
)
from launch.report.run_shapes import is_number
from launch.report.stats import split

SPARKS = "▁▂▃▄▅▆▇█"
ROWS = (  # metric, name, formatter
    ("perf/tokens_per_s", "tokens/s, in steps", grouped),
    ("perf/tokens_per_s_per_device", "per device", grouped),
    (STEP_TIME, "step p50", seconds),
    ("perf/step_time_p95_s", "step p95", seconds),
    ("perf/step_time_p99_s", "step p99", seconds),
    ("perf/step_time_max_s", "step max", seconds),
    (DATA_WAIT, "wait for data a step", seconds),
    ("perf/mfu", "MFU, causal", percent),
    ("perf/mfu_6n", "MFU, 6N", percent),
    ("perf/mbu", "MBU", percent),
    ("perf/hbm_peak_bytes", "HBM peak", size),
    ("comm/effective_bytes_per_s", "effective bandwidth", rate),
    ("comm/wire_bytes", "wire bytes a step", size),
    ("comm/overhead", "wire overhead", percent),
    (GOODPUT, "goodput", percent),
)


def latest(run: RunFolder, metric: str) -> float | None:
    """Returns a metric's last value; None if the run has none."""
    points = run.points(metric)
    return points[-1][1] if points else None


def progress(run: RunFolder) -> str:
    """Formats the progress as `120 of 200, 12 min 04 s left`."""
    steps = run.settings["steps"]
    text = f"{run.step} of {steps}"
    if run.state == "running" and run.seconds and type(steps) is int:
        tokens = run.step_tokens.before(steps + 1) - run.step_tokens.before(run.step + 1)
        steps_s = tokens / run.figures["perf/tokens_per_s"]
        text += f", {duration(steps_s / (run.figures.get(GOODPUT) or 1.0))} left"
    return text


def rows_of(run: RunFolder) -> list[tuple[str, str]]:
    """Returns (name, text) of each figure that the run has."""
    rows = [("state", run.state), ("step", progress(run))]
    for metric, name in ((LOSS, "loss, nats"), (EVAL_LOSS, "held-out loss, nats")):
        value = latest(run, metric)
        if value is not None:
            rows.append((name, f"{value:.4f}"))
    rows += _score_rows(run)
    values = run.figures
    rows += [(name, form(values[metric])) for metric, name, form in ROWS if metric in values]
    if run.wall_s is not None:
        rows.append(("wall time", duration(run.wall_s)))
    compiled = latest(run, "perf/compile_time_s")
    if compiled is not None:
        rows.append(("compilation", duration(compiled)))
    rows += _stragglers(run) + _site_rounds(run)
    if run.outliers:
        rows.append(("long steps", ", ".join(f"{n} {cause}" for cause, n in run.outliers.items())))
    rows += [(f"lost to {cause}", duration_or_ms(s)) for cause, s in run.lost_s.items() if s]
    rows.append(("device", f"{run.devices} x {run.device}{'' if run.chip else ' (no peak known)'}"))
    return rows


def newest_scores(run: RunFolder) -> dict[str, float]:
    """Returns the newest eval/NAME_... of tasks, sources and further held-out texts."""
    own, newest = ("eval/loss_nats", "eval/bits_per_byte", "eval/tokens"), {}
    for record in run.metrics:
        newest |= {key: x for key, x in record.items() if key.startswith("eval/")}
    return {key: x for key, x in newest.items() if key not in own and is_number(x)}


def _score_rows(run: RunFolder) -> list[tuple[str, str]]:
    """Returns the rows of the newest scores."""
    rows, scores = [], newest_scores(run)
    for metric, value in scores.items():
        name, _, figure = metric.removeprefix("eval/").rpartition("_accuracy")
        if name and not figure:
            error = scores.get(f"{metric}_stderr")
            text = f"{100 * value:.1f}{'' if error is None else f' ± {100 * error:.1f}'} %"
            rows.append((f"{name}, accuracy", text))
        for suffix, unit in (("_bits_per_byte", "bits/byte"), ("_loss_nats", "held-out nats")):
            if metric.endswith(suffix):
                rows.append((f"{metric[len('eval/') : -len(suffix)]}, {unit}", f"{value:.4f}"))
    return rows


def _stragglers(run: RunFolder) -> list[tuple[str, str]]:
    """Returns the row `1 (h1) in data, steps 600 to 900`, or `none`; [] without any probe."""
    names, found, probed = run.config.get("hosts"), [], False
    host_of = {str(i): name for i, name in enumerate(names if isinstance(names, list) else ())}
    for process, records in run.hosts.items():
        steps = {}  # kind -> the first and the last step at which it was named
        for record in (record for record in records if record.get("event") == PROBE):
            probed = True
            slow = record.get("slow")
            for kind in map(str, slow if isinstance(slow, list) else ()):
                steps.setdefault(kind, [record.get("step")] * 2)[1] = record.get("step")
        place = f"{process} ({host_of[process]})" if process in host_of else process
        found += [f"{place} in {kind}, steps {a} to {b}" for kind, (a, b) in steps.items()]
    return [("stragglers", "; ".join(found) or "none")] if probed else []


def _site_rounds(run: RunFolder) -> list[tuple[str, str]]:
    """Returns the row `12, 3 without west, also the newest`; [] for a run on one site."""
    place = run.config.get("site")
    names = place.get("sites") if isinstance(place, dict) else None
    if not isinstance(names, list):
        return []
    try:
        rounds = read_json_lines(run.folder / ROUNDS)
    except ValueError:  # a resume needs this file: the trainer says how to repair it
        return [("rounds of sites", f"{ROUNDS} is damaged")]
    # A line without tokens is a state that the site took over when it returned.
    present = [record.get("participants") for record in rounds if record.get("tokens")]
    present = [sites for sites in present if isinstance(sites, list)]
    if not present:
        return []
    text = str(len(present))
    for name in names:
        if absent := sum(name not in sites for sites in present):
            text += f", {absent} without {name}"
            text += ", also the newest" if name not in present[-1] else ""
    return [("rounds of sites", text)]


def spark(values: list[float], width: int = 32) -> str:
    """Returns a sparkline, each bar the mean of consecutive values; "" without values."""
    if not values:
        return ""
    means = [fmean(part) for part in split(values, min(width, len(values)))]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / ((high - low) or 1)
    return "".join(SPARKS[round((x - low) * scale)] for x in means)


def table_of(runs: list[RunFolder]) -> list[tuple[str, list[str]]]:
    """Returns a row of (name, a cell for each run) for every figure that a run has."""
    tables = [dict(rows_of(run)) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [table.get(name, "-") for table in tables]) for name in names]

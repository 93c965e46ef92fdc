"""Formats a run's figures as rows of text, for both the terminal and the page."""

from launch.report.run_folder import EVAL_LOSS, LOSS, STEP_TIME, RunFolder, duration
from launch.report.stats import mean, split
from launch.report.svg import digits

SPARKS = "▁▂▃▄▅▆▇█"


def seconds(value: float) -> str:
    """Formats seconds as `8.67 ms`, `720 ms` or `3.41 s`."""
    factor, unit = time_unit(value)
    return f"{digits(factor * value)} {unit}"


def time_unit(value: float) -> tuple[float, str]:
    """Returns (factor, unit) for showing seconds of this size."""
    return (1e3, "ms") if value < 0.9995 else (1.0, "s")


def percent(value: float) -> str:
    """Formats a share as `41.5 %`."""
    return f"{100 * value:.1f} %"


def size(value: float) -> str:
    """Formats bytes as `19.6 GiB` or `3.2 MiB`."""
    for unit, bytes_ in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= bytes_:
            return f"{digits(value / bytes_)} {unit}"
    return f"{value:.0f} B"


def rate(value: float) -> str:
    """Formats a network's bytes/s as `12.5 MB/s`, in powers of ten as links are specified."""
    factor, unit = rate_unit(value)
    return f"{digits(factor * value)} {unit}"


def rate_unit(value: float) -> tuple[float, str]:
    """Returns (factor, unit) for showing bytes/s of this size."""
    return (1e-6, "MB/s") if value < 1e9 else (1e-9, "GB/s")


def grouped(value: float) -> str:
    """Formats a number with a narrow space between groups of three digits."""
    return f"{value:,.0f}".replace(",", "\u202f")


ROWS = (  # metric, name, formatter
    ("perf/tokens_per_s", "tokens/s, in steps", grouped),
    ("perf/tokens_per_s_per_device", "per device", grouped),
    (STEP_TIME, "step p50", seconds),
    ("perf/step_time_p95_s", "step p95", seconds),
    ("perf/step_time_p99_s", "step p99", seconds),
    ("perf/step_time_max_s", "step max", seconds),
    ("data/wait_s", "wait for data a step", seconds),
    ("perf/mfu", "MFU, causal", percent),
    ("perf/mfu_6n", "MFU, 6N", percent),
    ("perf/mbu", "MBU", percent),
    ("perf/hbm_peak_bytes", "HBM peak", size),
    ("comm/effective_bytes_per_s", "effective bandwidth", rate),
    ("comm/wire_bytes", "wire bytes a step", size),
    ("comm/overhead", "wire overhead", percent),
    ("perf/goodput", "goodput", percent),
)


def latest(run: RunFolder, metric: str) -> float | None:
    """Returns a metric's last value; None if the run has none."""
    points = run.points(metric)
    return points[-1][1] if points else None


def progress(run: RunFolder) -> str:
    """Formats the progress as `120 of 200, 12 min 04 s left`."""
    steps = run.settings["steps"]
    text = f"{run.step} of {steps}"
    if run.state == "running" and run.step_times[0] and type(steps) is int:
        goodput = run.figures.get("perf/goodput") or 1.0
        step_s = mean([value for _, value in run.step_times[0]])
        left_s = (steps - run.step) * step_s / goodput
        text += f", {duration(left_s)} left"
    return text


def rows_of(run: RunFolder) -> list[tuple[str, str]]:
    """Returns (name, text) of the known figures; those that a run does not have are left out."""
    rows = [("state", run.state), ("step", progress(run))]
    for metric, name in ((LOSS, "loss, nats"), (EVAL_LOSS, "held-out loss, nats")):
        value = latest(run, metric)
        if value is not None:
            rows.append((name, f"{value:.4f}"))
    values = run.figures
    rows += [(name, form(values[metric])) for metric, name, form in ROWS if metric in values]
    wall = run.summary.get("perf/wall_s")
    if wall is not None:
        rows.append(("wall time", duration(wall)))
    compiled = latest(run, "perf/compile_time_s")
    if compiled is not None:
        rows.append(("compilation", duration(compiled)))
    outliers = run.summary.get("outliers")
    if outliers:
        rows.append(("long steps", ", ".join(f"{n} {cause}" for cause, n in outliers.items())))
    rows += [(f"lost to {cause}", duration_or_ms(s)) for cause, s in run.lost_s.items() if s]
    rows.append(("device", f"{run.devices} x {run.device}{'' if run.chip else ' (no peak known)'}"))
    return rows


def duration_or_ms(value: float) -> str:
    """Formats seconds with `duration` from 10 s on, otherwise with `seconds`."""
    return duration(value) if value >= 10 else seconds(value)


def spark(values: list[float], width: int = 32) -> str:
    """Returns a sparkline, each bar the mean of consecutive values; "" without values."""
    if not values:
        return ""
    means = [mean(part) for part in split(values, min(width, len(values)))]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / ((high - low) or 1)
    return "".join(SPARKS[round((x - low) * scale)] for x in means)

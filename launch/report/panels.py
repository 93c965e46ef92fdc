"""The charts of launch.report.page. A chart function returns None if there is nothing to draw."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, median

from launch.report.formats import (
    digits,
    duration_or_ms,
    percent,
    rate_unit,
    seconds,
    short,
    time_unit,
)
from launch.report.run_folder import DATA_WAIT, EVAL_LOSS, GOODPUT, LOSS, STEP_TIME, RunFolder
from launch.report.stats import histogram, percentile, smooth, split
from launch.report.svg import COLOURS, Series, heat_map, histogram_chart, line_chart, share_bar

SMOOTH_FROM = 40  # points; fewer show the trend by themselves
LEFT_OUT = "The first step after each start is left out."
HEAT = (  # metric of hosts/N.jsonl, title, formatter
    (STEP_TIME, "Step time by process", seconds),
    (DATA_WAIT, "Wait for data", seconds),
    ("rank/compute_ratio", "A fixed computation, against the median process", "{:.2f}x".format),
)
CELLS = 40  # at most in a row, and bars in a histogram


@dataclass(frozen=True)
class Panel:
    """A chart with its title and caption, and perhaps a table below it."""

    title: str
    chart: str  # SVG
    caption: str = ""
    rows: tuple[tuple[int, str, str, str], ...] = ()  # (colour, name, cell, cell)


def colour(index: int) -> int:
    """Returns the colour of the run with this index."""
    return index % COLOURS + 1


def label(runs: list[RunFolder], text: str) -> str:
    """Returns the label at a line's end: only the value if the colour identifies the run."""
    return text if len(runs) == 1 else text.split(" ")[-1]


def scaled(points: list[tuple[int, float]], factor: float) -> list[tuple[int, float]]:
    """Returns points with their values multiplied by a factor."""
    return [(step, factor * value) for step, value in points]


def loss(runs: list[RunFolder]) -> Panel | None:
    """Draws training losses, with their trend if they are many, and held-out losses as dots."""
    series, all_values = [], []
    for i, run in enumerate(runs):
        points, evals = run.points(LOSS), run.points(EVAL_LOSS)
        if points:
            trend = points
            if len(points) >= SMOOTH_FROM:
                trend = smooth(points)
                series.append(Series(points, "", colour(i), faint=True))
            series.append(Series(trend, label(runs, f"train {trend[-1][1]:.3f}"), colour(i)))
        if evals:
            own_colour = 2 if len(runs) == 1 else colour(i)
            text = f"held out {evals[-1][1]:.3f}" if len(runs) == 1 else ""
            series.append(Series(evals, text, own_colour, dots=True))
        all_values += [y for _, y in points + evals]
    if not series:
        return None
    low, high = min(all_values), max(all_values)
    if len(all_values) >= SMOOTH_FROM:  # the fall of the first steps would flatten the rest
        high = min(high, low + 2.5 * (percentile(all_values, 0.9) - low))
    dots = "" if len(runs) == 1 else "Dots: held-out loss."
    return Panel("Loss, nats a token", line_chart("loss over steps", series, low, high), dots)


def timeline(runs: list[RunFolder]) -> Panel | None:
    """Draws step times over steps; one run's events are marked."""
    factor, unit = _time_unit(runs)
    series, values, descriptions = [], [], {}
    for i, run in enumerate(runs):
        points = scaled(run.step_times[0], factor)
        if points:
            times = [value for _, value in points]
            series.append(Series(points, label(runs, f"p50 {digits(median(times))}"), colour(i)))
            values += times
            descriptions[run.step_times[1]] = None
    if not series:
        return None
    high = max(1.15 * percentile(values, 0.99), 1.3 * median(values))
    above = sum(value > high for value in values)
    caption = "; ".join(descriptions).capitalize() + (f"; {above} above the frame" if above else "")
    events = runs[0].events if len(runs) == 1 else ()
    chart = line_chart("step time over steps", series, None, min(high, max(values)), events, True)
    return Panel(f"Step time, {unit}", chart, f"{caption}. {LEFT_OUT}")


def _time_unit(runs):
    known = [run.figures[STEP_TIME] for run in runs if STEP_TIME in run.figures]
    return time_unit(max(known, default=0.0))


def times(runs: list[RunFolder]) -> Panel | None:
    """Draws the distribution of step times; one run's percentiles are marked."""
    factor, unit = _time_unit(runs)
    known = [(colour(i), [factor * value for value in run.seconds]) for i, run in enumerate(runs)]
    known = [(own_colour, values) for own_colour, values in known if len(values) > 2]
    if not known:
        return None
    every = [value for _, values in known for value in values]
    low, high = min(every), max(1.1 * percentile(every, 0.99), 1.001 * min(every))
    bins = min(CELLS, max(8, round(2 * len(every) ** 0.5)))
    counts = [histogram(values, low, high, bins) for _, values in known]
    marks, caption = [], []
    if len(runs) == 1:
        marks = [(percentile(every, q), f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99)]
        caption = [f"{name} {digits(value)}" for value, name in marks]
    beyond = sum(value > high for value in every)
    caption += [f"{beyond} beyond, in the last bar"] if beyond else []
    colours = [own_colour for own_colour, _ in known]
    chart = histogram_chart("histogram of step times", counts, low, high, colours, marks)
    return Panel(f"Step times, {unit}", chart, ", ".join(caption))


def throughput(runs: list[RunFolder]) -> Panel | None:
    """Draws tokens per second in steps, and for one run also over all time."""
    series = []
    for i, run in enumerate(runs):
        actual = run.points("perf/tokens_per_s_actual")[1:]
        points = run.points("perf/tokens_per_s")[1:]
        if len(runs) == 1 and actual:
            series.append(Series(actual, "", 1, faint=True))
        if points:
            series.append(Series(points, label(runs, short(points[-1][1])), colour(i)))
    if not series:
        return None
    caption = "Faint: with saves, evaluations and stalls." if len(runs) == 1 else ""
    return Panel("Tokens a second", line_chart("tokens a second", series, 0.0), caption)


def utilisation(runs: list[RunFolder]) -> Panel | None:
    """Draws MFU and MBU of one run; of several runs only MFU, as each colour is a run."""
    single = len(runs) == 1
    metrics = (("perf/mfu", "MFU"), ("perf/mbu", "MBU"))[: 2 if single else 1]
    series = []
    for i, run in enumerate(runs):
        for j, (metric, name) in enumerate(metrics):
            points = scaled(run.points(metric), 100)
            if points:
                text = label(runs, f"{name} {short(points[-1][1])}")
                series.append(Series(points, text, colour(j if single else i)))
    if not series:
        return None
    title = "MFU and MBU, %" if single else "MFU, %"
    return Panel(title, line_chart(title, series, 0.0), "Shares of the chip's peaks.")


def bandwidth(runs: list[RunFolder]) -> Panel | None:
    """Draws the effective bandwidth between hosts."""
    metric = "comm/effective_bytes_per_s"
    known = [run.figures[metric] for run in runs if metric in run.figures]
    factor, unit = rate_unit(max(known, default=0.0))
    series = []
    for i, run in enumerate(runs):
        points = scaled(run.points(metric), factor)
        if points:
            series.append(Series(points, label(runs, short(points[-1][1])), colour(i)))
    if not series:
        return None
    caption = "Payload of the collectives between hosts over the time that they took."
    return Panel(f"Effective bandwidth, {unit}", line_chart("bandwidth", series, 0.0), caption)


def goodput(run: RunFolder, suffix: str) -> Panel | None:
    """Draws the shares of the wall-clock time; `suffix` ends the title."""
    share = run.figures.get(GOODPUT)
    if share is None:
        return None
    lost_s = {cause: value for cause, value in run.lost_s.items() if value > 0}
    total = sum(lost_s.values())
    parts = [(1, "steps", share, "")]
    for i, (cause, value) in enumerate(lost_s.items()):
        own_colour = i + 2 if i + 2 <= COLOURS else 0  # the smallest share the colour grey
        parts.append((own_colour, cause, (1 - share) * value / total, duration_or_ms(value)))
    bar = share_bar("where the time went", [(number, part) for number, _, part, _ in parts])
    rows = tuple((number, name, words, percent(part)) for number, name, part, words in parts)
    return Panel(f"Where the time went{suffix}", bar, rows=rows)


def heat(run: RunFolder, suffix: str) -> Iterator[Panel]:
    """Draws what each process measured, with a row for each; `suffix` ends the titles."""
    if len(run.hosts) < 2:
        return
    for metric, title, form in HEAT:
        rows = [(process, _cells(run, process, metric, form)) for process in run.hosts]
        rows = [(process, cells) for process, cells in rows if cells]
        values = [value for _, cells in rows for _, value in cells]
        if not values:
            continue
        low, high = percentile(values, 0.02), percentile(values, 0.98)
        caption = f"Each cell is the mean of some steps: pale {form(low)}, dark {form(high)}."
        yield Panel(f"{title}{suffix}", heat_map(title, rows, low, high), caption)


def _cells(run, process, metric, form):
    timed = run.process_points(process, metric)[1:]
    cells = []
    for part in split(timed, min(CELLS, len(timed))) if timed else []:
        value = fmean(value for _, value in part)
        cells.append((f"steps {part[0][0]} to {part[-1][0]}: {form(value)}", value))
    return cells

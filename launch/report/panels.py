"""The charts of launch.report.page; a chart without data is an empty string."""

from html import escape

from launch.report.figures import duration_or_ms, percent, rate_unit, seconds, time_unit
from launch.report.run_folder import EVAL_LOSS, LOSS, STEP_TIME, RunFolder
from launch.report.stats import histogram, mean, median, percentile, split
from launch.report.svg import (
    COLOURS,
    Series,
    digits,
    heat_map,
    histogram_chart,
    line_chart,
    share_bar,
    short,
    smooth,
)

SMOOTH_FROM = 40  # points; fewer show the trend by themselves
LEFT_OUT = "The first step after each start is left out."
CELLS = 40  # at most in a row, and bars in a histogram


def section(title: str, body: str, caption: str = "") -> str:
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<section><h2>{escape(title)}</h2><figure>{body}{caption}</figure></section>"


def colour(index: int) -> int:
    return index % COLOURS + 1


def label(runs, text: str) -> str:
    """Returns the label at a line's end: only the value, as the colour identifies the run."""
    return text if len(runs) == 1 else text.split(" ")[-1]


def loss(runs) -> str:
    series, all_values = [], []
    for i, run in enumerate(runs):
        points, evals = run.points(LOSS), run.points(EVAL_LOSS)
        first = colour(i)
        if points:
            rough = len(points) >= SMOOTH_FROM
            trend = smooth(points) if rough else points
            if rough:
                series.append(Series(points, "", first, faint=True))
            series.append(Series(trend, label(runs, f"train {trend[-1][1]:.3f}"), first))
        if evals:
            second = 2 if len(runs) == 1 else first
            text = f"held out {evals[-1][1]:.3f}" if len(runs) == 1 else ""
            series.append(Series(evals, text, second, dots=True))
        all_values += [y for _, y in points + evals]
    if not series:
        return ""
    low, high = min(all_values), max(all_values)
    if len(all_values) >= SMOOTH_FROM:  # the first fall would flatten all the rest
        high = min(high, low + 2.5 * (percentile(all_values, 0.9) - low))
    dots = "" if len(runs) == 1 else "Dots: held-out loss."
    return section("Loss, nats a token", line_chart("loss over steps", series, low, high), dots)


def timeline(runs) -> str:
    factor, unit = _time_unit(runs)
    series, values, words = [], [], {}
    for i, run in enumerate(runs):
        points, what = run.step_times
        if points:
            points = [(step, factor * value) for step, value in points]
            times = [value for _, value in points]
            series.append(Series(points, label(runs, f"p50 {digits(median(times))}"), colour(i)))
            values += times
            words[what] = None
    if not series:
        return ""
    high = max(1.15 * percentile(values, 0.99), 1.3 * median(values))
    above = sum(value > high for value in values)
    caption = "; ".join(words).capitalize() + (f"; {above} above the frame" if above else "")
    marks = _events(runs[0]) if len(runs) == 1 else ()
    chart = line_chart("step time over steps", series, None, min(high, max(values)), marks, True)
    return section(f"Step time, {unit}", chart, caption + f". {LEFT_OUT}")


def _time_unit(runs):
    known = [run.figures[STEP_TIME] for run in runs if STEP_TIME in run.figures]
    return time_unit(max(known, default=0.0))


def _events(run: RunFolder):
    """(step, words) of what happened, once each."""
    found = {}
    for record in run.hosts.get("0", []):
        if "event" in record and record.get("step") is not None:
            cause = f", {record['cause']}" if "cause" in record else ""
            found[record["step"]] = f"step {record['step']}: {record['event']}{cause}"
    return sorted(found.items())


def times(runs) -> str:
    factor, unit = _time_unit(runs)
    known = [(i, [factor * value for _, value in run.step_times[0]]) for i, run in enumerate(runs)]
    known = [(i, values) for i, values in known if len(values) > 2]
    if not known:
        return ""
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
    colours = [colour(i) for i, _ in known]
    chart = histogram_chart("histogram of step times", counts, low, high, colours, marks)
    return section(f"Step times, {unit}", chart, ", ".join(caption))


def throughput(runs) -> str:
    series = []
    for i, run in enumerate(runs):
        actual = run.points("perf/tokens_per_s_actual")[1:]
        points = run.points("perf/tokens_per_s")[1:]
        if len(runs) == 1 and actual:
            series.append(Series(actual, "", 1, faint=True))
        if points:
            text = label(runs, f"{short(points[-1][1])}")
            series.append(Series(points, text, colour(i)))
    if not series:
        return ""
    caption = "Faint: with saves, evaluations and stalls." if len(runs) == 1 else ""
    return section("Tokens a second", line_chart("tokens a second", series, 0.0), caption)


def utilisation(runs) -> str:
    """Draws MFU and MBU of one run; of several runs only MFU, as each colour is a run."""
    one = len(runs) == 1
    metrics = (("perf/mfu", "MFU"), ("perf/mbu", "MBU"))[: 2 if one else 1]
    series = []
    for i, run in enumerate(runs):
        for j, (metric, name) in enumerate(metrics):
            points = [(step, 100 * value) for step, value in run.points(metric)]
            if points:
                text = label(runs, f"{name} {short(points[-1][1])}")
                series.append(Series(points, text, colour(j if one else i)))
    if not series:
        return ""
    title = "MFU and MBU, %" if one else "MFU, %"
    return section(title, line_chart(title, series, 0.0), "Shares of the chip's peaks.")


def bandwidth(runs) -> str:
    metric = "comm/effective_bytes_per_s"
    known = [run.figures[metric] for run in runs if metric in run.figures]
    factor, unit = rate_unit(max(known, default=0.0))
    series = []
    for i, run in enumerate(runs):
        points = [(step, factor * value) for step, value in run.points(metric)]
        if points:
            series.append(Series(points, label(runs, short(points[-1][1])), colour(i)))
    if not series:
        return ""
    caption = "Payload of the collectives between hosts over the time that they took."
    return section(f"Effective bandwidth, {unit}", line_chart("bandwidth", series, 0.0), caption)


def goodput(run: RunFolder, name: str) -> str:
    share = run.figures.get("perf/goodput")
    if share is None:
        return ""
    lost_s = {cause: value for cause, value in run.lost_s.items() if value > 0}
    total = sum(lost_s.values())
    rows = [(1, "steps", share, "")]
    for i, (cause, value) in enumerate(lost_s.items()):
        key = i + 2 if i + 2 <= COLOURS else 0  # the smallest share one colour
        rows.append((key, cause, (1 - share) * value / total, duration_or_ms(value)))
    table = "".join(
        f'<tr><th><span class="key b{key}"></span>{escape(cause)}</th>'
        f"<td>{words}</td><td>{percent(part)}</td></tr>"
        for key, cause, part, words in rows
    )
    bar = share_bar("where the time went", [(key, part) for key, _, part, _ in rows])
    return section(f"Where the time went{name}", f"{bar}<table>{table}</table>")


def heat(run: RunFolder, name: str):
    """Rows of hosts by stretches of steps, for step time and for the wait for data."""
    if len(run.hosts) < 2:
        return
    for metric, title in ((STEP_TIME, "Step time by process"), ("data/wait_s", "Wait for data")):
        rows = [(process, _cells(lines, metric)) for process, lines in run.hosts.items()]
        rows = [(process, cells) for process, cells in rows if cells]
        values = [value for _, cells in rows for _, value in cells]
        if not values:
            continue
        low, high = percentile(values, 0.02), percentile(values, 0.98)
        caption = (
            f"Each cell a stretch of steps, its mean: pale {seconds(low)}, full {seconds(high)}."
        )
        yield section(f"{title}{name}", heat_map(title, rows, low, high), caption)


def _cells(lines, metric):
    timed = [(r["step"], r[metric]) for r in lines if metric in r][1:]
    cells = []
    for part in split(timed, min(CELLS, len(timed))) if timed else []:
        value = mean([value for _, value in part])
        cells.append((f"steps {part[0][0]} to {part[-1][0]}: {seconds(value)}", value))
    return cells

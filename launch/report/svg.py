"""Draws charts as inline SVG, in colours that are CSS variables of the page.

A chart is 360 units wide, about the pixels of a phone, so that its text is shown there at the size
given here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from operator import itemgetter

from launch.report.formats import short
from launch.report.stats import split

WIDTH, HEIGHT = 360, 190
LEFT, TOP, BOTTOM = 40, 10, 22  # margins, in which the ticks' labels stand
LETTER = 6.3  # mean width of a letter at the size of labels
COLOURS = 6

Points = Sequence[tuple[float, float]]  # (x, y)


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    points: Points
    label: str = ""  # written at the line's end
    colour: int = 1  # from 1 to COLOURS
    faint: bool = False
    dots: bool = False  # mark the last points


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle and its scales."""

    low: tuple[float, float]  # x, y
    high: tuple[float, float]
    right: float = WIDTH - 8

    def x(self, value: float) -> float:
        """Returns the horizontal position of a value."""
        share = (value - self.low[0]) / ((self.high[0] - self.low[0]) or 1)
        return round(LEFT + share * (self.right - LEFT), 1)

    def y(self, value: float) -> float:
        """Returns the vertical position of a value, from the top."""
        share = (value - self.low[1]) / ((self.high[1] - self.low[1]) or 1)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns at most `most` multiples, in [low, high], of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    while math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1 > most:
        step *= 2.5 if str(f"{step:.0e}").startswith("2") else 2
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Points, most: int = 320) -> Points:
    """Reduces many points to the lowest and the highest of each of `most / 2` ranges, in order."""
    if len(points) <= most:
        return points
    extremes = []
    for part in split(points, most // 2):
        extremes += sorted({min(part, key=itemgetter(1)), max(part, key=itemgetter(1))})
    return extremes


def _text(x, y, words, kind="", anchor="") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{anchor}>{escape(words)}</text>'


def line_chart(
    title: str,
    series: Sequence[Series],
    low: float | None = None,
    high: float | None = None,
    marks: Sequence[tuple[int, str]] = (),
    mark_above: bool = False,
) -> str:
    """Draws lines over steps, each labelled at its end and cut off at `high`.

    Args:
        title: the description for screen readers.
        series: at least one, with points.
        marks: (step, words) of events, which are ticks on the axis of steps.
        mark_above: draws a triangle at the top for every point that is cut off.
    """
    values = [y for line in series for _, y in line.points]
    steps = [x for line in series for x, _ in line.points]
    low = min(values) if low is None else low
    top = max(values) if high is None else high
    margin = 0.06 * (top - low) or abs(top) * 0.1 or 1.0
    named = [line for line in series if line.label]
    room = max((LETTER * len(line.label) for line in named), default=0)
    bottom = low - margin if low else low
    frame = Frame((min(steps), bottom), (max(steps), top + margin), WIDTH - 8 - min(room, 130))
    body = _grid(frame)
    for line in series:
        body += _line(frame, line, top) + (_above(frame, line, top) if mark_above else "")
    for step, words in marks:
        if frame.low[0] <= step <= frame.high[0]:
            place = f"M{frame.x(step)} {HEIGHT - BOTTOM}v-8"
            body += f'<path class="mark" d="{place}"><title>{escape(words)}</title></path>'
    heights = [frame.y(min(line.points[-1][1], top)) for line in named]
    for line, y in zip(named, apart(heights, TOP + 4, HEIGHT - BOTTOM - 2), strict=True):
        body += _text(frame.right + 5, y + 4, line.label, f"c{line.colour}")
    return wrap(title, body)


def apart(heights: Sequence[float], low: float, high: float, gap: float = 13) -> list[float]:
    """Returns the labels' heights, moved so that they are `gap` apart, in order, below `high`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed, last = [0.0] * len(heights), low - gap
    for i in order:
        placed[i] = last = max(heights[i], last + gap)
    limit = high
    for i in reversed(order):
        placed[i] = limit = min(placed[i], limit)
        limit -= gap
    return placed


def _line(frame, line, top) -> str:
    points = thin(line.points)
    path = " ".join(f"{frame.x(x)},{frame.y(min(y, top))}" for x, y in points)
    kind = "faint" if line.faint else "line"
    body = f'<polyline class="{kind} k{line.colour}" points="{path}"/>'
    if line.dots or len(points) == 1:
        for x, y in points[-40:]:
            place = f'cx="{frame.x(x)}" cy="{frame.y(min(y, top))}"'
            body += f'<circle class="f{line.colour}" {place} r="2.6"/>'
    return body


def _above(frame, line, top) -> str:
    body = ""
    for step, value in line.points:
        if value > top:
            place = f"M{frame.x(step) - 3:.1f} {TOP + 3}h6l-3 -5z"
            words = f"<title>step {step}: {short(value)}</title>"
            body += f'<path class="f{line.colour}" d="{place}">{words}</path>'
    return body


def _grid(frame) -> str:
    body = ""
    for value in ticks(frame.low[1], frame.high[1]):
        y = frame.y(value)
        body += f'<path class="grid" d="M{LEFT} {y}H{frame.right}"/>'
        body += _text(LEFT - 5, y + 4, short(value), "tick", "end")
    for value in ticks(frame.low[0], frame.high[0], 4):
        body += _text(frame.x(value), HEIGHT - 6, short(value), "tick", "middle")
    return body


def histogram_chart(
    title: str,
    counts: Sequence[Sequence[int]],
    low: float,
    high: float,
    colours: Sequence[int],
    marks: Sequence[tuple[float, str]],
) -> str:
    """Draws the histogram of one series as bars, and those of several as outlines.

    Args:
        counts: for each series, the number of values in each of equal bins of [low, high].
        marks: (value, words) of labelled vertical lines, in rising order.
    """
    shares = [[n / max(sum(bins), 1) for n in bins] for bins in counts]
    peak = max(max(bins) for bins in shares)
    frame = Frame((low, 0.0), (high, peak * 1.3))
    body = "".join(
        _text(frame.x(value), HEIGHT - 6, short(value), "tick", "middle")
        for value in ticks(low, high, 5)
    )
    floor = HEIGHT - BOTTOM
    for bins, colour in zip(shares, colours, strict=True):
        width = (high - low) / len(bins)
        path = f"M{frame.x(low)} {floor}"
        for i, share in enumerate(bins):
            path += f"V{frame.y(share)}H{frame.x(low + (i + 1) * width)}"
        filled = f" f{colour} bars" if len(shares) == 1 else ""
        body += f'<path class="line k{colour}{filled}" d="{path}V{floor}"/>'
    body += f'<path class="axis" d="M{LEFT} {floor}H{frame.right}"/>'
    places = _spread([frame.x(value) for value, _ in marks], 40)
    for (value, words), place in zip(marks, places, strict=True):
        x = frame.x(value)
        body += f'<path class="mark" d="M{x} {floor}V{TOP + 16}"/>'
        body += _text(place, TOP + 10, words, "", "middle")
    return wrap(title, body)


def _spread(places, gap):
    """Returns horizontal positions, moved so that words of width `gap` do not touch."""
    return apart(places, LEFT + gap / 2 - 10, WIDTH - gap / 2, gap)


def heat_map(
    title: str, rows: Sequence[tuple[str, list[tuple[str, float]]]], low: float, high: float
) -> str:
    """Draws a row of cells for each process; the closer a value is to `high`, the darker its cell.

    Args:
        rows: (name, [(words, value) of each range of steps]), with at least one range.
    """
    row_height = max(4, min(20, 480 // len(rows)))
    named = math.ceil(13 / row_height)  # every how many rows a name fits
    left = 18 + LETTER * max(len(name) for name, _ in rows)
    body = ""
    for i, (name, cells) in enumerate(rows):
        y = TOP + i * row_height
        if i % named == 0:
            body += _text(left - 6, y + row_height / 2 + 3, name, "", "end")
        width = (WIDTH - 8 - left) / len(cells)
        for j, (words, value) in enumerate(cells):
            share = min(1.0, max(0.0, (value - low) / ((high - low) or 1)))
            body += (
                f'<rect class="heat" x="{left + j * width:.1f}" y="{y}" width="{width - 0.5:.1f}" '
                f'height="{row_height - 1}" fill-opacity="{0.12 + 0.88 * share:.2f}">'
                f"<title>{escape(words)}</title></rect>"
            )
    return wrap(title, body, TOP + row_height * len(rows) + 6)


def share_bar(title: str, shares: Sequence[tuple[int, float]]) -> str:
    """Draws a bar that is filled by (colour, share) parts; colour 0 is grey."""
    body, x = "", 0.0
    for colour, share in shares:
        place = f'x="{x:.1f}" y="0" width="{share * WIDTH:.1f}" height="22"'
        body += f'<rect class="f{colour}" {place}/>'
        x += share * WIDTH
    return wrap(title, body, 22)


def wrap(title: str, body: str, height: float = HEIGHT) -> str:
    """Wraps the body in an svg element that scales to its container."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
    )

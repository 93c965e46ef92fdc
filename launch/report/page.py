"""Renders the page of one or more runs: one HTML file without scripts or external resources."""

import time
from collections.abc import Iterator
from pathlib import Path

import jinja2

from launch.report import panels
from launch.report.figures import latest, progress, table_of
from launch.report.formats import seconds, short
from launch.report.run_folder import GOODPUT, LOSS, STEP_TIME, RunFolder
from launch.report.svg import COLOURS

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names and texts come from the run
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(runs: list[RunFolder], refresh_s: int = 0) -> str:
    """Returns the HTML of a page.

    Args:
        refresh_s: seconds after which a browser reloads the page; 0 for never.
    """
    single = len(runs) == 1
    return TEMPLATES.get_template("page.html").render(
        runs=runs,
        single=single,
        title=runs[0].name if single else f"{len(runs)} runs",
        refresh_s=refresh_s,
        colours=COLOURS,
        colour=panels.colour,
        progress=progress,
        tiles=_tiles(runs[0]),
        panels=[panel for panel in _panels(runs) if panel],
        figures=table_of(runs),
        lists=list(_lists(runs)),
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )


def _tiles(run: RunFolder) -> list[tuple[str, str]]:
    """Returns (name, text) of the figures that stand out at the top."""
    found = run.figures
    tiles = (
        ("loss, nats", latest(run, LOSS), lambda x: f"{x:.3f}"),
        ("tokens/s", found.get("perf/tokens_per_s"), short),
        ("step p50", found.get(STEP_TIME), seconds),
        ("MFU", found.get("perf/mfu"), lambda x: f"{100 * x:.1f} %"),
        ("goodput", found.get(GOODPUT), lambda x: f"{100 * x:.0f} %"),
    )
    return [(name, form(value)) for name, value, form in tiles if value is not None]


def _panels(runs) -> Iterator[panels.Panel | None]:
    yield panels.loss(runs)
    yield panels.timeline(runs)
    yield panels.times(runs)
    yield panels.throughput(runs)
    yield panels.utilisation(runs)
    yield panels.bandwidth(runs)
    for run in runs:
        suffix = f": {run.name}" if len(runs) > 1 else ""
        yield panels.goodput(run, suffix)
        yield from panels.heat(run, suffix)


def _lists(runs) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields (title, (name, text) pairs) of the routes and versions of each run."""
    for run in runs:
        suffix = f": {run.name}" if len(runs) > 1 else ""
        routes = {name: " ".join(str(text).split()) for name, text in run.routes.items()}
        # A route's text starts with its name.
        yield f"Routes{suffix}", [(k, v.removeprefix(k).strip()) for k, v in routes.items()]
        yield f"Versions{suffix}", [(k, " ".join(str(v).split())) for k, v in run.versions.items()]

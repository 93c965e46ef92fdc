"""Summarises finished or running jobs: a table in the terminal, and one HTML page.

    python -m launch.summary runs/quickstart
    python -m launch.summary runs/a runs/b --out=both.html
    python -m launch.summary runs/quickstart --follow      # again every 10 s, until it ends
    python -m launch.summary 1125-142201-9f3c --follow     # a job of launch.run, over SSH

The page is one file without scripts or external resources, and is readable on a phone. Below the
table, branches and averages in the same folder as a run are drawn as a tree, and the gradient noise
that --diagnose_every has measured proposes the next data.batch_schedule.

The run directory that a job's trainer named at its start is copied into the job's local folder. A
job at several sites has a column for each; if one cannot be read, the others are shown and the exit
status is 1.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.arguments import Parser, bounded
from launch.host.exit_codes import INTERRUPTED
from launch.host.files import write_text
from launch.pull import RunCopy, Source, fetch, find_sources
from launch.report.batch_sizes import describe_proposals, propose_schedule
from launch.report.figures import latest, newest_scores, spark, table_of
from launch.report.lineage import describe_lineage
from launch.report.page import page
from launch.report.run_folder import EVAL_LOSS, LOSS, NoRun, RunFolder, read_run
from launch.ssh import HostError
from launch.terminal import note, show, visible, warn

FOLLOW_S = 10
DONE = ("done", "stopped")  # a run's state begins with one of these if it has ended


def table(runs: list[RunFolder]) -> str:
    """Returns the figures as text, with a column for each run, and the runs' branches."""
    rows = [("", [run.name for run in runs]), *table_of(runs)]
    width = max(len(name) for name, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
    lines = []
    for name, cells in rows:
        aligned = [f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)]
        lines.append(f"{name:<{width}}  {'  '.join(aligned)}".rstrip())
    for run in runs:
        curve = spark([value for _, value in run.points(LOSS)])
        steps = spark(run.seconds)
        lines += [f"{run.name}: loss {curve}", f"{run.name}: step time {steps}"]
    lines += describe_lineage(runs) + describe_proposals(runs)
    return "\n".join(map(visible, lines))  # or a run's files could add lines


def as_json(run: RunFolder) -> dict:
    """Returns all figures of a run by metric name."""
    last = {metric: latest(run, metric) for metric in (LOSS, EVAL_LOSS)}
    return {
        "config_hash": run.config_hash,
        "versions": run.versions,
        "routes": run.routes,
        "device": run.device_kind,
        "devices": run.devices,
        "chip": run.chip,
        "run": str(run.folder),
        "state": run.state,
        "step": run.step,
        "lineage": run.config.get("lineage"),
        "proposed_batch_schedule": propose_schedule(run) or None,
        "lost_s": run.lost_s,
        **{metric: value for metric, value in last.items() if value is not None},
        **newest_scores(run),
        **run.figures,
    }


def parse(argv: Sequence[str] | None, prog: str = "python -m launch.summary") -> argparse.Namespace:
    """Parses the command line; exits with status 2 if it is wrong."""
    parser = Parser(prog, (__doc__ or "").replace("python -m launch.summary", prog))
    parser.add_argument("runs", nargs="+", metavar="DIR|JOB", help="run directories, or jobs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the page [DIR/summary.html]"
    )
    parser.add_argument("--follow", action="store_true", help="repeat until all runs have ended")
    parser.add_argument(
        "--every",
        type=bounded(float, 0.01, 86_400),
        default=FOLLOW_S,
        metavar="S",
        help="seconds between repeats of --follow [%(default)s]",
    )
    parser.add_argument(
        "--workdir",
        default="",
        metavar="DIR",
        help="the run directory of a JOB of another program than the trainer",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as JSON, one line for each run"
    )
    return parser.parse_intermixed_args(argv)


def read_runs(sources: Sequence[Source]) -> tuple[list[RunFolder | None], list[Exception]]:
    """Returns the runs, None for that of a job that cannot be read now, and why those cannot.

    Raises:
        NoRun, HostError: no run can be read.
        ValueError: a folder has no run, or a file is damaged.
    """
    runs, errors = [], []
    for source in sources:
        try:
            runs.append(read_run(fetch(source)))
        except (NoRun, HostError) as error:  # the other sites are shown all the same
            if not isinstance(source, RunCopy):
                raise
            runs.append(None)
            errors.append(error)
    if not any(runs):
        raise errors[0]
    return runs, errors


def summarise(args: argparse.Namespace, sources: Sequence[Source], live: bool) -> tuple[bool, bool]:
    """Reads the runs, prints the table, writes the page.

    Returns:
        whether all runs have ended, and whether all could be read.
    """
    found, errors = read_runs(sources)
    runs = [run for run in found if run]
    ended = all(
        (run is not None and run.state.startswith(DONE)) or is_over(source)
        for run, source in zip(found, sources, strict=True)
    )
    out = args.out or runs[0].folder / "summary.html"
    try:
        write_text(out, page(runs, 0 if ended or not live else max(1, round(args.every))))
    except OSError as error:
        raise ValueError(f"the page must be writable; got {error}. Set --out.") from None
    if args.json:
        show("\n".join(json.dumps(as_json(run)) for run in runs))
    else:
        if live and sys.stdout.isatty():
            sys.stdout.write("\033[H\033[J")  # clears the screen
        show(f"{table(runs)}\npage {out}")
    for error in errors:  # at the end, where clearing the screen leaves them
        warn(f"error: {error}")
    return ended, not errors


def is_over(source: Source) -> bool:
    """Returns whether a source is a job that has ended; a failed job's run writes no summary."""
    return isinstance(source, RunCopy) and source.job_ended


def follow(args: argparse.Namespace, sources: Sequence[Source]) -> bool:
    """Summarises until all runs have ended; waits for jobs to start and for hosts to answer.

    Returns:
        whether all runs could be read at the end.
    """
    jobs = any(isinstance(source, RunCopy) for source in sources)
    while True:
        try:
            ended, complete = summarise(args, sources, True)
            if ended:
                return complete
        except (NoRun, HostError) as error:
            if not jobs or all(is_over(source) for source in sources):
                raise
            note(f"{error} Trying again in {args.every:g} s.")
        time.sleep(args.every)


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.summary") -> int:
    args = parse(argv, prog)
    try:
        sources = [s for name in args.runs for s in find_sources(name, args.workdir)]
        complete = follow(args, sources) if args.follow else summarise(args, sources, False)[1]
    except (ValueError, HostError) as error:
        warn(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())

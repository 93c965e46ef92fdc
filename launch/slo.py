"""Records a cluster's performance as a baseline, checks later runs against it, computes prices.

    python -m launch.slo record runs/a runs/b runs/c --out=a40x8.json
    python -m launch.slo record runs/a --provisional --out=first.json
    python -m launch.slo check runs/today --against=a40x8.json
    python -m launch.slo price --against=a40x8.json --prices=docs/prices.toml
    python -m launch.slo price --against=a40x8.json --prices=docs/prices.toml \\
        --tokens=2.5e9 --deadline=7d --availability=0.95

`record` derives each figure's bound from the spread between the runs. With fewer than three runs it
takes the spread between blocks of steps, which misses differences between runs; a single run needs
--provisional, and each check says so. `--confidence` is the probability that an equally fast run
meets all bounds at once, so each bound is wider the more figures are enforced. The tolerance of a
figure is at least its floor, 1 to 5 %, however well the runs agree.

`check` exits with the first of these that applies to the run, or to that of any site of a job:
  1  a bound is broken; if JAXTRAIN_NOTIFY_URL is set, this is also sent to that webhook
  2  the run is not comparable with the baseline, because the config, the chip, the number of
     devices, hosts or processes, or the versions differ; or it cannot be read
  3  some bounds could not be judged: the run has too few steps for a percentile
  0  all bounds are met
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.arguments import Parser, bounded, positive
from launch.host.files import write_text
from launch.host.webhook import DEFAULT, VARIABLE, Webhook, read_url
from launch.pull import RunCopy, fetch, find_sources
from launch.report.baseline import KEYS, NOT_JUDGED, VERSION, check, record, refusals
from launch.report.price import price, read_prices, read_span
from launch.report.run_folder import RunFolder, read_run
from launch.report.slo_figures import FIGURES
from launch.report.slo_tables import bound_text, show_check, show_price, show_record
from launch.ssh import HostError
from launch.terminal import show, warn

CONFIDENCE = 0.95  # of all bounds together; 0.99 makes those of 3 runs 2.3 times as wide as 0.95
BREACH, REFUSED, UNJUDGED = 1, 2, 3  # exit statuses


def read_baseline(path: Path | str) -> dict:
    """Reads a file that `record` wrote.

    Raises:
        ValueError: the file is not a baseline.
    """
    try:
        found = json.loads(Path(path).read_text())
        version = found["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--against must be a file of `launch.slo record`; got {path}: {error}."
        ) from None
    if version not in (1, VERSION):
        raise ValueError(f"--against must have version 1 or {VERSION}; {path} has {version}.")
    if version == 1:
        found["power"] = {}  # it left out the figures that are not of step times
    if not _is_baseline(found):
        raise ValueError(f"--against must be as `launch.slo record` wrote it; {path} is not.")
    return found


def _is_baseline(found: dict) -> bool:
    """Returns whether the parts that a check and a price read have their types."""
    is_number = lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max
    try:
        time.gmtime(found["recorded"])
        entries = found["figures"].items()
        return (
            set(KEYS) <= set(found["key"])
            and all(isinstance(name, str) for name in found["runs"])
            and all(name in FIGURES and isinstance(e["how"], str) for name, e in entries)
            and all(is_number(e["value"]) for _, e in entries)
            and all(e["bound"] is None or is_number(e["bound"]) for _, e in entries)
            and all(e["bound"] != 0 for _, e in entries)
            and _is_power(found.get("power"), is_number)
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError):
        return False


def _is_power(power: Any, is_number: Callable[[Any], bool]) -> bool:
    """Returns whether the part that a check prints of what it can see has its types."""
    if not power:  # of version 1
        return True
    caught = power["least_caught"]
    numbers = [power["false_alarms"], power["figures"], power["between"], caught or 0]
    return all(is_number(value) for value in numbers) and type(power["assumed"]) is bool


def do_record(args: argparse.Namespace) -> int:
    """Writes a baseline; returns the exit status."""
    sources = [source for name in args.runs for source in find_sources(name)]
    if len(sources) > len(args.runs):
        raise ValueError(
            "a baseline must be of repetitions at one site; got a job at several sites. Name the "
            "jobs of one site, JOB.SITE."
        )
    if len(args.runs) == 1 and not args.provisional:
        raise ValueError(
            "a baseline of one run knows nothing of the differences between runs: of runs that "
            "differ by 5 %, a third would breach it. Give three RUNs or more, or --provisional."
        )
    baseline = record([read_run(fetch(source)) for source in sources], args.confidence)
    try:
        write_text(args.out, json.dumps(baseline, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"--out must be writable; got {error}.") from None
    show(json.dumps(baseline) if args.json else show_record(baseline, args.out))
    return 0


def do_check(args: argparse.Namespace) -> int:
    """Checks a run, or the run of each site, against a baseline; returns the exit status."""
    across = [name for name in args.across.split(",") if name]
    unknown = [name for name in across if name not in KEYS]
    if unknown:
        raise ValueError(f"--across must name some of {', '.join(KEYS)}; got {unknown[0]!r}.")
    baseline, url = read_baseline(args.against), read_url(DEFAULT, VARIABLE)
    sources, codes = find_sources(args.run), []
    for source in sources:
        try:
            codes.append(check_run(read_run(fetch(source)), baseline, across, args, url))
        except (ValueError, HostError) as error:  # the other sites are checked all the same
            site = f"{source.job.id}: " if isinstance(source, RunCopy) and sources[1:] else ""
            warn(f"error: {site}{error}")
            codes.append(REFUSED)
    return min(filter(None, codes), default=0)  # BREACH, else REFUSED, else UNJUDGED


def check_run(
    run: RunFolder, baseline: dict, across: Sequence[str], args: argparse.Namespace, url: str = ""
) -> int:
    """Prints how a run compares with a baseline; returns the exit status.

    Args:
        url: of a webhook that a breach is sent to; "" sends nothing.

    Raises:
        ValueError: they are not comparable.
    """
    differing = refusals(baseline, run, across)
    if differing:
        raise ValueError("\n".join(["the run is not comparable with --against:", *differing]))
    rows = check(baseline, run)
    broken = [row for row in rows if row["state"] == "BREACH"]
    if broken and url:
        alert_breach(url, run, broken, args.against)
    named = [{"name": run.name} | row for row in rows]  # of a site's run: the site
    show(json.dumps(named) if args.json else show_check(rows, run, baseline, args.against))
    if broken:
        return BREACH
    return UNJUDGED if NOT_JUDGED in [row["state"] for row in rows] else 0


def alert_breach(url: str, run: RunFolder, broken: Sequence[dict], against: str) -> None:
    """Sends the figures that break their bounds to a webhook."""
    texts = []
    for row in broken:
        figure = FIGURES[row["figure"]]
        value = "not measured" if row["run"] is None else figure.form(row["run"])
        bound = bound_text(figure, row["bound"])
        texts.append(f"{figure.words} {value}, must be {bound}")
    webhook = Webhook(url, run.name, warn)
    webhook.send("breach", f"SLO breach against {against}: {'; '.join(texts)}")
    webhook.close()


def do_price(args: argparse.Namespace) -> int:
    """Prints the cost and the capacity; returns the exit status."""
    if bool(args.tokens) != bool(args.deadline):
        raise ValueError("--tokens and --deadline must come together.")
    span_s = read_span(args.deadline) if args.deadline else None
    baseline, prices = read_baseline(args.against), read_prices(args.prices)
    found = price(baseline, prices, args.availability, args.tokens, span_s, args.params)
    show(json.dumps(found) if args.json else show_price(found))
    return 0


def parse(argv: Sequence[str] | None, prog: str = "python -m launch.slo") -> argparse.Namespace:
    """Parses the command line; exits with status 2 if it is wrong."""
    doc = (__doc__ or "").replace("python -m launch.slo", prog)
    parser = Parser(prog, doc)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = lambda name, text: verbs.add_parser(name, help=text, doc=doc)
    recording = add("record", "write a baseline from one or more runs")
    recording.add_argument(
        "runs", nargs="+", metavar="RUN", help="repetitions: directories or jobs"
    )
    recording.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where to write the baseline (JSON)"
    )
    recording.add_argument(
        "--provisional", action="store_true", help="accept a baseline of a single run"
    )
    recording.add_argument(
        "--confidence",
        type=float,
        default=CONFIDENCE,
        help="probability that an equal run meets all bounds [%(default)s]",
    )
    checking = add("check", "check a run against a baseline")
    checking.add_argument("run", metavar="RUN", help="a run directory or a job")
    checking.add_argument(
        "--across", default="", metavar="KEYS", help="keys that may differ: versions,hosts,..."
    )
    pricing = add("price", "compute the cost of 1e9 tokens, and the GPUs for a deadline")
    pricing.add_argument(
        "--prices", required=True, metavar="FILE", help="TOML, like docs/prices.toml"
    )
    pricing.add_argument(
        "--tokens", type=positive(float), help="tokens to train on; needs --deadline"
    )
    pricing.add_argument("--deadline", metavar="SPAN", help="time for --tokens: 90m, 36h, 7d or 2w")
    pricing.add_argument(
        "--params", type=positive(float), help="parameter count of another model; scales the speed"
    )
    pricing.add_argument(
        "--availability",
        type=bounded(float, 0.001, 1),
        default=1.0,
        help="share of the time with GPUs [%(default)s]",
    )
    for verb in (checking, pricing):
        verb.add_argument("--against", required=True, metavar="FILE", help="the baseline file")
    for verb in (recording, checking, pricing):
        verb.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.verb == "record" and not 0.5 < args.confidence < 1:
        parser.error(f"--confidence must be in (0.5, 1); got {args.confidence}.")
    return args


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.slo") -> int:
    args = parse(argv, prog)
    try:
        return {"record": do_record, "check": do_check, "price": do_price}[args.verb](args)
    except (ValueError, HostError) as error:
        warn(f"error: {error}")
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())

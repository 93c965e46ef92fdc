"""Compares two runs of the same work on different devices, relative to what the devices can do.

    python -m launch.compare runs/a40 runs/h100
    python -m launch.compare runs/a40 runs/h100 --ceilings a40.json h100.json
    python -m launch.compare --external docs/track3_record44.toml   # published figures

A side is a run directory, a folder of run directories (repetitions), the run of a job, or a
[[side]] of a TOML file of published figures. A job at two sites gives both sides. The comparison is
refused (exit status 1) unless config, data and tokens per step are equal and the losses agree
within their noise. A ratio above 1 means that A is faster. --ceilings takes the results of
`python -m pallas_kernels.bench --out=FILE` on A's and B's device.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from launch.arguments import Parser, bounded
from launch.pull import fetch, find_sources
from launch.report.comparable import differences, match_losses
from launch.report.formats import digits
from launch.report.ratios import NORMALISERS, SPEEDS, normalise, ratios, speeds
from launch.report.sides import Side, read_external, read_side, with_ceilings
from launch.report.stats import RESAMPLES, SEED, block_length
from launch.ssh import HostError
from launch.terminal import show, warn

MARGIN = 0.05


def compare(
    a: Side,
    b: Side,
    margin: float = MARGIN,
    by: str = "",
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict:
    """Returns the comparison of A and B, which `report` formats.

    Args:
        margin: relative difference up to which the sides count as equal.
        by: the normaliser of the verdict; "" for the best one that is known.
    """
    found = {"a": describe(a), "b": describe(b), "verdict": "not comparable", "why": []}
    found["why"] = differences(a, b)
    match = match_losses(a, b)
    if match is None:
        found["why"].append("losses: too few steps have a loss on both sides to estimate the noise")
    elif match.errors > match.limit:
        found["why"].append(f"losses: {match}")
    if found["why"]:
        return found
    rows = normalise(a, b, ratios(a, b, resamples, seed), margin)
    known = [name for name, row in rows.items() if "missing" not in row]
    if by and by not in known:
        found["why"] = [f"--by={by}: {rows[by]['missing']}"]
        return found
    by = by or next(name for name in ("roofline", "peak_flops", "raw") if name in known)
    return found | {
        "losses": str(match),
        "rows": rows,
        "by": by,
        "interval": method(a, b, rows["raw"], resamples, seed),
        "verdict": rows[by]["verdict"]["verdict"],
        "words": rows[by]["verdict"]["words"],
        "margin": rows[by]["verdict"]["margin"],
    }


def method(a: Side, b: Side, raw: dict, resamples: int, seed: int) -> str:
    """Describes how the intervals were computed, and warns if the sides' times differ in kind."""
    if raw["tokens_per_s"]["low"] is None:
        return "no intervals: a side has a single step time"
    blocks = sorted({block_length(len(run)) for side in (a, b) for run in side.times_s})
    words = (
        f"95 % intervals by circular block bootstrap over steps, blocks of "
        f"{' and '.join(map(str, blocks))}, {resamples} resamples, seed {seed}"
    )
    if a.what != b.what:
        words += f"\np50 and p95 differ in kind: {a.what} against {b.what}"
    return words


def describe(side: Side) -> dict:
    """Returns the figures of one side."""
    speed = speeds(side, side.times_s)
    copied = ("name", "device", "devices", "config_hash", "data_fingerprint", "tokens_per_step")
    found = {key: getattr(side, key) for key in copied}
    tokens = side.tokens_per_step / side.devices
    return found | {
        "tokens_per_s_per_device": speed["tokens_per_s"],
        "step_time_s": tokens / speed["p50"],
        "step_time_p95_s": tokens / speed["p95"],
        "times": sum(map(len, side.times_s)),
        "what": side.what,
    }


def report(found: dict) -> str:
    """Formats the comparison as text with one table."""
    lines = []
    for letter in "ab":
        side = found[letter]
        lines.append(
            f"{letter.upper()}  {side['name']}: {side['devices']} x {side['device']}, "
            f"{side['tokens_per_s_per_device']:,.0f} tokens/s each, "
            f"step p50 {side['step_time_s'] * 1e3:.1f} p95 {side['step_time_p95_s'] * 1e3:.1f} ms "
            f"({side['times']} {side['what']})"
        )
    if found["why"]:
        return "\n".join([*lines, *(f"not comparable: {why}" for why in found["why"])])
    side = found["a"]
    lines.append(
        f"the same work: config {side['config_hash']}, data {side['data_fingerprint'][:32]}, "
        f"{side['tokens_per_step']:,} tokens a step; losses {found['losses']}"
    )
    head = "".join(f"{words:>21}" for words in SPEEDS.values())
    lines += ["", f"{'A over B; above 1, A is faster':32}{head}  verdict on tokens/s"]
    for row in found["rows"].values():
        if "missing" in row:
            lines.append(f"{row['words']:32}  {row['missing']}")
            continue
        cells = "".join(f"{_cell(row[name]):>21}" for name in SPEEDS)
        lines.append(f"{row['words']:32}{cells}  {row['verdict']['words']}")
    words = found["rows"][found["by"]]["words"]
    lines += ["", found["interval"], f"verdict, {words}: {found['words']}"]
    return "\n".join(lines)


def _cell(found) -> str:
    if found["low"] is None:
        return digits(found["ratio"])
    return f"{digits(found['ratio'])} ({digits(found['low'])}-{digits(found['high'])})"


def parse(argv: Sequence[str] | None, prog: str = "python -m launch.compare") -> argparse.Namespace:
    """Parses the command line; exits with status 2 if it is wrong."""
    parser = Parser(prog, (__doc__ or "").replace("python -m launch.compare", prog))
    parser.add_argument(
        "sides", nargs="*", metavar="DIR|JOB", help="A and B, unless --external names them"
    )
    parser.add_argument(
        "--external", metavar="FILE", help="a TOML file with one or two sides of published figures"
    )
    parser.add_argument(
        "--ceilings", nargs=2, metavar="FILE", help="results of pallas_kernels.bench for A and B"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="relative difference up to which A and B count as equal [%(default)s]",
    )
    parser.add_argument(
        "--by",
        choices=NORMALISERS,
        default="",
        help="normaliser of the verdict in the last line [roofline, else peak_flops, else raw]",
    )
    parser.add_argument(
        "--may_differ",
        default="",
        metavar="NAMES",
        help="further settings that may differ, besides those that only report: a,b",
    )
    parser.add_argument(
        "--resamples",
        type=bounded(int, 100, 1_000_000),
        default=RESAMPLES,
        help="bootstrap resamples [%(default)s]",
    )
    parser.add_argument(
        "--seed",
        type=bounded(int, 0, 2**32 - 1),
        default=SEED,
        help="seed of the bootstrap [%(default)s]",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    args = parser.parse_intermixed_args(argv)
    if not 0 < args.margin < 1:
        parser.error(f"--margin must be between 0 and 1; got {args.margin}.")
    return args


def read_sides(args: argparse.Namespace) -> list[Side]:
    """Reads A and B.

    Raises:
        ValueError: a side cannot be read, or there are not two.
        HostError: a job's first host does not answer.
    """
    may_differ = [name for name in args.may_differ.split(",") if name]
    sources = [source for name in args.sides for source in find_sources(name)]
    sides = [read_side(fetch(source), may_differ) for source in sources]
    sides += read_external(args.external) if args.external else []
    if len(sides) != 2:
        raise ValueError(
            f"two sides must be given; got {len(sides)}. Name two DIRs or jobs, or --external."
        )
    if args.ceilings:
        sides = [with_ceilings(*pair) for pair in zip(sides, args.ceilings, strict=True)]
    return sides


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.compare") -> int:
    args = parse(argv, prog)
    try:
        a, b = read_sides(args)
        found = compare(a, b, args.margin, args.by, args.resamples, args.seed)
    except (ValueError, HostError) as error:
        warn(f"error: {error}")
        return 1
    show(json.dumps(found, indent=1) if args.json else report(found))
    return 1 if found["verdict"] == "not comparable" else 0


if __name__ == "__main__":
    sys.exit(main())

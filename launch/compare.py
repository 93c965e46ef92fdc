"""Two runs of the same work, on two kinds of device: who does more with what its device can do?

    python -m launch.compare runs/a40 runs/h100
    python -m launch.compare runs/a40 runs/h100 --ceilings a40.json h100.json
    python -m launch.compare --external docs/track3_record44.toml   # published figures

A side is a run directory, a folder of run directories (repetitions), or a [[side]] of a TOML file
of published figures. Refused (exit status 1) unless config, data and tokens a step are the same and
the losses agree within their noise. A ratio above 1 says that A does more. --ceilings takes what
`python -m pallas_kernels.bench --out=FILE` measured on A's device and on B's.
"""

import json
import sys

from launch.arguments import Parser
from launch.report.comparable import differences, match_losses
from launch.report.sides import Side, read_external, read_side, with_ceilings
from launch.report.stats import RESAMPLES, SEED, block_length, bootstrap, mean, percentile
from launch.report.svg import digits

MARGIN = 0.05
SPEEDS = {"tokens_per_s": "tokens/s", "p50": "at step p50", "p95": "at step p95"}
NORMALISERS = {  # name -> words, what a device of that side can do (per s), why it is not known
    "raw": ("raw, per device", lambda side: 1.0, ""),
    "peak_flops": (
        "per peak FLOP/s (datasheet)",
        lambda side: side.peak_flops_per_s,
        "no peak is known for {device}",
    ),
    "hbm_bytes": (
        "per HBM byte/s (datasheet)",
        lambda side: side.hbm_bytes_per_s,
        "no bandwidth is known for {device}",
    ),
    "ceiling_flops": (
        "per measured bf16 matmul FLOP/s",
        lambda side: side.matmul_flops_per_s,
        "no --ceilings given",
    ),
    "ceiling_bytes": (
        "per measured copy byte/s",
        lambda side: side.copy_bytes_per_s,
        "no --ceilings given",
    ),
    "roofline": (
        "against this step's roofline",
        lambda side: (
            side.tokens_per_step / side.devices / side.roofline_s if side.roofline_s else None
        ),
        "no roofline of this step is known for {device}",
    ),
}


def speeds(side: Side, runs) -> dict[str, float]:
    """Tokens/s of one device: of all steps together, at the median step and at the slow one."""
    times = [seconds for run in runs for seconds in run]
    tokens = side.tokens_per_step / side.devices
    at = {
        "tokens_per_s": mean(times),
        "p50": percentile(times, 0.5),
        "p95": percentile(times, 0.95),
    }
    return {name: tokens / seconds for name, seconds in at.items()}


def ratios(a: Side, b: Side, resamples=RESAMPLES, seed=SEED) -> dict[str, dict]:
    """{speed: {"ratio", "low", "high"}}, A over B; no bounds where a side has a single figure."""

    def statistics(drawn):
        ours, theirs = speeds(a, drawn[0]), speeds(b, drawn[1])
        return {name: ours[name] / theirs[name] for name in SPEEDS}

    point = statistics([a.times_s, b.times_s])
    found = {name: {"ratio": value, "low": None, "high": None} for name, value in point.items()}
    if min(sum(map(len, side.times_s)) for side in (a, b)) < 2:
        return found
    bounds = bootstrap(statistics, [a.times_s, b.times_s], resamples, seed)
    for name, (low, high) in bounds.items():
        found[name] |= {"low": low, "high": high}
    return found


def judge(found: dict, margin: float) -> dict:
    """The verdict on a ratio with its bounds.

    `equal` within the margin where the whole interval is; `ahead` or `behind` where all of it is
    beyond; `equal` within a wider margin, which is named, where the steps cannot tell 1 from it;
    else `undecided`.
    """
    ratio = found["ratio"]
    low, high = (ratio if found[key] is None else found[key] for key in ("low", "high"))
    if 1 / (1 + margin) <= low and high <= 1 + margin:
        return {"verdict": "equal", "margin": margin, "words": f"equal within {share(margin)}"}
    times = f"{digits(ratio)} times B"
    if low > 1 + margin:
        return {"verdict": "ahead", "margin": low - 1, "words": f"A ahead, {times}"}
    if high < 1 / (1 + margin):
        return {"verdict": "behind", "margin": 1 - high, "words": f"A behind, {times}"}
    if low <= 1 <= high:
        wider = max(high - 1, 1 / low - 1)
        words = f"equal within {share(wider)}: these steps cannot tell {share(margin)}"
        return {"verdict": "equal", "margin": wider, "words": words}
    words = f"undecided: the interval crosses the margin of {share(margin)}"
    return {"verdict": "undecided", "margin": margin, "words": words}


def share(value: float) -> str:
    return f"{float(digits(100 * value, 2)):g} %"


def normalise(a: Side, b: Side, raw: dict, margin: float) -> dict[str, dict]:
    """{normaliser: {"words", speed: ratio and bounds, "verdict"}}, or {"words", "missing"}."""
    rows = {}
    for name, (words, ability, why) in NORMALISERS.items():
        unknown = [side.device for side in (a, b) if not ability(side)]
        if unknown:
            reason = why.format(device=" and ".join(dict.fromkeys(unknown)))
            rows[name] = {"words": words, "missing": reason}
            continue
        scale = ability(b) / ability(a)
        row = {
            speed: {k: None if v is None else v * scale for k, v in found.items()}
            for speed, found in raw.items()
        }
        rows[name] = {"words": words, **row, "verdict": judge(row["tokens_per_s"], margin)}
    return rows


def compare(a: Side, b: Side, margin=MARGIN, by="", resamples=RESAMPLES, seed=SEED) -> dict:
    """All that there is to say of A and B; see `report` for how it reads."""
    found = {"a": describe(a), "b": describe(b), "verdict": "not comparable", "why": []}
    found["why"] = differences(a, b)
    match = match_losses(a, b)
    if match is None:
        found["why"].append("losses: no step has a loss on both sides, or too few to see the noise")
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
    """How the intervals came about, and what in the table is not of one kind."""
    if raw["tokens_per_s"]["low"] is None:
        return "no intervals: a side has one figure alone"
    blocks = sorted({block_length(len(run)) for side in (a, b) for run in side.times_s})
    words = (
        f"95 % intervals by circular block bootstrap over steps, blocks of "
        f"{' and '.join(map(str, blocks))}, {resamples} resamples, seed {seed}"
    )
    if a.what != b.what:
        words += f"\np50 and p95 are not of one kind: {a.what} against {b.what}"
    return words


def describe(side: Side) -> dict:
    speed = speeds(side, side.times_s)
    kept = ("name", "device", "devices", "config_hash", "data_fingerprint", "tokens_per_step")
    found = {key: getattr(side, key) for key in kept}
    tokens = side.tokens_per_step / side.devices
    return found | {
        "tokens_per_s_per_device": speed["tokens_per_s"],
        "step_time_s": tokens / speed["p50"],
        "step_time_p95_s": tokens / speed["p95"],
        "times": sum(map(len, side.times_s)),
        "what": side.what,
    }


def report(found: dict) -> str:
    """The comparison in words and one table."""
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
    lines += ["", f"{'A over B; above 1, A does more':32}{head}  verdict on tokens/s"]
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


def parse(argv, prog="python -m launch.compare"):
    parser = Parser(prog, __doc__.replace("python -m launch.compare", prog))
    parser.add_argument("sides", nargs="*", metavar="DIR", help="A and B, as far as not --external")
    parser.add_argument(
        "--external", metavar="FILE", help="published figures, TOML: one or two sides"
    )
    parser.add_argument(
        "--ceilings", nargs=2, metavar="FILE", help="of pallas_kernels.bench, A's and B's"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="within which they count as equal [%(default)s]",
    )
    parser.add_argument(
        "--by",
        choices=NORMALISERS,
        default="",
        help="whose verdict is the last line's [roofline, else peak_flops, else raw]",
    )
    parser.add_argument(
        "--may_differ", default="", metavar="NAMES", help="settings that need not be the same: a,b"
    )
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=SEED, help="of the resamples [%(default)s]")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    args = parser.parse_intermixed_args(argv)
    if not 0 < args.margin < 1:
        parser.error(f"--margin must be between 0 and 1; got {args.margin}.")
    if args.resamples < 100:
        parser.error(f"--resamples must be 100 or more; got {args.resamples}.")
    return args


def read_sides(args) -> list[Side]:
    may_differ = [name for name in args.may_differ.split(",") if name]
    sides = [read_side(path, may_differ) for path in args.sides]
    sides += read_external(args.external) if args.external else []
    if len(sides) != 2:
        raise ValueError(
            f"two sides must be given; got {len(sides)}. Name two DIRs, or --external."
        )
    if args.ceilings:
        sides = [with_ceilings(*pair) for pair in zip(sides, args.ceilings, strict=True)]
    return sides


def main(argv=None, prog="python -m launch.compare") -> int:
    args = parse(argv, prog)
    try:
        a, b = read_sides(args)
        found = compare(a, b, args.margin, args.by, args.resamples, args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1) if args.json else report(found))
    return 1 if found["verdict"] == "not comparable" else 0


if __name__ == "__main__":
    sys.exit(main())

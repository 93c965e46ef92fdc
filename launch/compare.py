"""Compares two runs of the same work on different devices, relative to what the devices can do.

    python -m launch.compare runs/a40 runs/h100
    python -m launch.compare runs/a40 runs/h100 --ceilings a40.json h100.json
    python -m launch.compare --external docs/track3_record44.toml   # published figures

A side is a run directory, a folder of run directories (repetitions), or a [[side]] of a TOML file
of published figures. The comparison is refused (exit status 1) unless config, data and tokens per
step are equal and the losses agree within their noise. A ratio above 1 means that A does more.
--ceilings takes the results of `python -m pallas_kernels.bench --out=FILE` on A's and B's device.
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
NORMALISERS = {  # name -> (words, a device's ability per second, why it is unknown)
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


def speeds(side: Side, runs: list[list[float]]) -> dict[str, float]:
    """Returns tokens/s of one device: over all steps, at the median step and at a slow step."""
    times = [seconds for run in runs for seconds in run]
    tokens = side.tokens_per_step / side.devices
    step_s = {
        "tokens_per_s": mean(times),
        "p50": percentile(times, 0.5),
        "p95": percentile(times, 0.95),
    }
    return {name: tokens / seconds for name, seconds in step_s.items()}


def ratios(
    a: Side, b: Side, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, dict[str, float | None]]:
    """Returns {speed: {"ratio", "low", "high"}} of A over B; bounds need two step times a side."""

    def speed_ratios(drawn):
        speeds_a, speeds_b = speeds(a, drawn[0]), speeds(b, drawn[1])
        return {name: speeds_a[name] / speeds_b[name] for name in SPEEDS}

    point = speed_ratios([a.times_s, b.times_s])
    found = {name: {"ratio": value, "low": None, "high": None} for name, value in point.items()}
    if min(sum(map(len, side.times_s)) for side in (a, b)) < 2:
        return found
    bounds = bootstrap(speed_ratios, [a.times_s, b.times_s], resamples, seed)
    for name, (low, high) in bounds.items():
        found[name] |= {"low": low, "high": high}
    return found


def verdict_on(bounds: dict, margin: float) -> dict:
    """Returns the verdict on a ratio with its bounds.

    It is `equal` if the whole interval is within the margin, `ahead` or `behind` if all of it is
    beyond. If the interval contains 1 it is `equal` within a wider margin, which is named.
    Otherwise it is `undecided`.
    """
    ratio = bounds["ratio"]
    low, high = (ratio if bounds[key] is None else bounds[key] for key in ("low", "high"))
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
    """Returns {normaliser: {"words", speed: bounds, "verdict"} or {"words", "missing"}}."""
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
        rows[name] = {"words": words, **row, "verdict": verdict_on(row["tokens_per_s"], margin)}
    return rows


def compare(a: Side, b: Side, margin=MARGIN, by="", resamples=RESAMPLES, seed=SEED) -> dict:
    """Returns the whole comparison of A and B, which `report` formats."""
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
    """Describes how the intervals were computed, and which figures are of different kinds."""
    if raw["tokens_per_s"]["low"] is None:
        return "no intervals: a side has a single step time"
    blocks = sorted({block_length(len(run)) for side in (a, b) for run in side.times_s})
    words = (
        f"95 % intervals by circular block bootstrap over steps, blocks of "
        f"{' and '.join(map(str, blocks))}, {resamples} resamples, seed {seed}"
    )
    if a.what != b.what:
        words += f"\np50 and p95 are not of one kind: {a.what} against {b.what}"
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
    parser = Parser(prog, (__doc__ or "").replace("python -m launch.compare", prog))
    parser.add_argument(
        "sides", nargs="*", metavar="DIR", help="A and B, unless --external names them"
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
        "--may_differ", default="", metavar="NAMES", help="settings that may differ: a,b"
    )
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help="of the bootstrap [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of the resamples [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
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

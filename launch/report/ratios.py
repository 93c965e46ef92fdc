"""Computes ratios of two sides' speeds, relative to what their devices can do, with verdicts."""

from statistics import fmean

from launch.report.formats import digits
from launch.report.sides import Side
from launch.report.stats import RESAMPLES, SEED, bootstrap, percentile

SPEEDS = {"tokens_per_s": "tokens/s", "p50": "at step p50", "p95": "at step p95"}
NORMALISERS = {  # name -> (words, a device's capability per second, why it is unknown)
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
        "tokens_per_s": fmean(times),
        "p50": percentile(times, 0.5),
        "p95": percentile(times, 0.95),
    }
    return {name: tokens / seconds for name, seconds in step_s.items()}


def ratios(
    a: Side, b: Side, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, dict[str, float | None]]:
    """Returns {speed: {"ratio", "low", "high"}} of A over B.

    The bounds are None if a side has only one step time.
    """

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

    It is `equal` if the interval lies within the margin, and `ahead` or `behind` if it lies beyond.
    An interval that crosses the margin is `equal` within a wider margin, which is returned, if it
    contains 1, and `undecided` otherwise.
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
        words = f"equal within {share(wider)}: too few steps to resolve {share(margin)}"
        return {"verdict": "equal", "margin": wider, "words": words}
    words = f"undecided: the interval crosses the margin of {share(margin)}"
    return {"verdict": "undecided", "margin": margin, "words": words}


def share(value: float) -> str:
    """Formats a share as `5 %`, with two significant digits."""
    return f"{float(digits(100 * value, 2)):g} %"


def normalise(a: Side, b: Side, raw: dict, margin: float) -> dict[str, dict]:
    """Returns {normaliser: {"words", speed: bounds, "verdict"} or {"words", "missing"}}."""
    rows = {}
    for name, (words, capability, why) in NORMALISERS.items():
        unknown = [side.device for side in (a, b) if not capability(side)]
        if unknown:
            reason = why.format(device=" and ".join(dict.fromkeys(unknown)))
            rows[name] = {"words": words, "missing": reason}
            continue
        scale = capability(b) / capability(a)
        row = {
            speed: {k: None if v is None else v * scale for k, v in found.items()}
            for speed, found in raw.items()
        }
        rows[name] = {"words": words, **row, "verdict": verdict_on(row["tokens_per_s"], margin)}
    return rows

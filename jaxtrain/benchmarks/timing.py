"""Times variants that take turns in one process; each turn is one sample."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.reporting.table import format_table

SETTLE_S = 0.02  # between turns: the last variant's thread pool spins for some milliseconds


class TimedCall(NamedTuple):
    wall_s: float
    cpu_s: float  # of this process, all threads
    others: float  # share of the machine that other processes used; NaN if unknown


def machine_busy_s() -> float:
    """Returns the CPU seconds that the machine has worked since it started; NaN without /proc."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan")
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def time_call(function: Callable[..., Any], *args: Any) -> TimedCall:
    """Times one call of a function that returns only when its work is done."""
    busy_s, wall_s, cpu_s = machine_busy_s(), time.perf_counter(), time.process_time()
    function(*args)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    others_s = machine_busy_s() - busy_s - cpu_s
    return TimedCall(wall_s, cpu_s, max(others_s / (wall_s * (os.cpu_count() or 1)), 0.0))


def warm_up(variants: Mapping[Any, Callable[[int], Any]], most_s: float) -> dict[Any, float]:
    """Returns the seconds of each variant's first call, with compilation; calls it once more.

    A variant whose first call took more than most_s is not called again.
    """
    first_s = {}
    for name, function in variants.items():
        first_s[name] = time_call(function, 0).wall_s
        if first_s[name] <= most_s:
            function(1)
    return first_s


def interleave(
    variants: Mapping[Any, Callable[[int], Any]], rounds: int, most_s: float = float("inf")
) -> dict[Any, list[TimedCall]]:
    """Times variants in turns (A B C A B C), so that a busy moment of the machine hits all.

    Args:
        variants: name -> function(turn). Turns start at 2, as the warm-up has used 0 and 1.
        most_s: a variant that has used this much time in all skips the later rounds.
    """
    samples: dict[Any, list[TimedCall]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name, function in variants.items():
            if sum(sample.wall_s for sample in samples[name]) <= most_s:
                time.sleep(SETTLE_S)
                samples[name].append(time_call(function, turn + 2))
    return samples


def summarise(samples: Sequence[TimedCall]) -> dict[str, float]:
    """Returns the medians, and the fastest sample, which other processes disturbed the least."""
    walls_s, cpus_s, others = zip(*samples, strict=True)
    return {
        "wall_s": statistics.median(walls_s),
        "wall_min_s": min(walls_s),
        "cpu_s": statistics.median(cpus_s),
        "others": statistics.median(others),
        "samples": len(samples),
    }


def target_verdict(value: float, target: float, at_most: bool = False) -> str:
    """Returns text such as "target >= 1 met" or "target >= 1 MISSED"."""
    met = value <= target if at_most else value >= target
    return f"target {'<=' if at_most else '>='} {target:g} {'met' if met else 'MISSED'}"


def ratio_row(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str, target: float | None
) -> dict[str, Any]:
    """Returns the row of one variant's speed-up over another; its name is "OURS / THEIRS"."""
    ratio = theirs["wall_s"] / ours["wall_s"]
    return {
        "suite": ours["suite"],
        "case": ours["case"],
        "ratio": name,
        "wall": ratio,
        "of_minima": theirs["wall_min_s"] / ours["wall_min_s"],
        "cpu": theirs["cpu_s"] / ours["cpu_s"],
        "target": target_verdict(ratio, target) if target else "",
    }


def format_comparison(
    rows: Sequence[Mapping[str, Any]],
    ratios: Sequence[Mapping[str, Any]],
    work: str,
    columns: Mapping[str, Callable[[Any], str]],
) -> str:
    """Returns a table of times and, if there are any, one of ratios.

    Args:
        work: what a turn does, such as "step".
        columns: further columns of the times, which replace those of the same name.
    """
    times = {
        "case": lambda r: r["case"],
        "variant": lambda r: r["variant"],
        f"{work} ms": lambda r: f"{1e3 * r['wall_s']:.1f}",
        "min": lambda r: f"{1e3 * r['wall_min_s']:.1f}",
        "cpu ms": lambda r: f"{1e3 * r['cpu_s']:.1f}",
        "first s": lambda r: f"{r['first_call_s']:.1f}",
        "others": lambda r: f"{r['others']:.0%}",
        "n": lambda r: r["samples"],
    }
    speedups = {
        "case": lambda r: r["case"],
        "speed-up of": lambda r: r["ratio"],
        "target": lambda r: r["target"],
        "wall": lambda r: f"{r['wall']:.2f}x",
        "of minima": lambda r: f"{r['of_minima']:.2f}x",
        "cpu": lambda r: f"{r['cpu']:.2f}x",
    }
    text = format_table(rows, {**times, **columns})
    return f"{text}\n\n{format_table(ratios, speedups)}" if ratios else text

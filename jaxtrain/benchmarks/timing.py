"""Side-by-side timing: variants take turns in one process, and each turn is one sample."""

import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

SETTLE_S = 0.02  # between turns: the thread pool of the one before spins on for milliseconds


class TimedCall(NamedTuple):
    wall_s: float
    cpu_s: float  # of this process, all threads
    others: float  # share of the machine that other processes used meanwhile; nan if unknown


def machine_busy_s() -> float:
    """CPU seconds that the machine has worked since it started; nan where /proc does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan")
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def timed(function, *args) -> TimedCall:
    """One call; it must return when its work is done."""
    busy_s, wall_s, cpu_s = machine_busy_s(), time.perf_counter(), time.process_time()
    function(*args)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    others_s = machine_busy_s() - busy_s - cpu_s
    return TimedCall(wall_s, cpu_s, max(others_s / (wall_s * (os.cpu_count() or 1)), 0.0))


def warm_up(variants, most_s: float) -> dict[str, float]:
    """Seconds of each variant's first call, compilation included; a second call is not counted."""
    first_s = {}
    for name, function in variants.items():
        first_s[name] = timed(function, 0).wall_s
        if first_s[name] <= most_s:
            function(1)
    return first_s


def interleave(variants, rounds: int, most_s: float = float("inf")) -> dict[str, list[TimedCall]]:
    """Samples of each variant, taken in turns A B C A B C, so that all meet the same machine.

    Args:
        variants: name -> function(turn), turn from 2 on; turns 0 and 1 are the warm-up's.
        most_s: a variant that has taken so long in all sits the later rounds out.
    """
    samples = {name: [] for name in variants}
    for turn in range(rounds):
        for name, function in variants.items():
            if sum(sample.wall_s for sample in samples[name]) <= most_s:
                time.sleep(SETTLE_S)
                samples[name].append(timed(function, turn + 2))
    return samples


def summarise(samples: list[TimedCall]) -> dict[str, float]:
    """Medians, and the fastest sample: what the machine can do when left alone."""
    walls_s, cpus_s, others = zip(*samples, strict=True)
    return {
        "wall_s": statistics.median(walls_s),
        "wall_min_s": min(walls_s),
        "cpu_s": statistics.median(cpus_s),
        "others": statistics.median(others),
        "samples": len(samples),
    }


def verdict(value: float, target: float, at_most: bool = False) -> str:
    """`target >= 1 met`, or missed."""
    met = value <= target if at_most else value >= target
    return f"target {'<=' if at_most else '>='} {target:g} {'met' if met else 'MISSED'}"

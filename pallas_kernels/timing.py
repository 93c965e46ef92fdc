"""How long a function takes on a device: medians of many calls, compilation apart."""

import statistics
import time
from typing import NamedTuple

import jax

SAMPLES = 20
SAMPLE_S = 5e-3  # calls of one sample take at least this long: the host's own time is then small


class Timing(NamedTuple):
    """Of one call, seconds."""

    median_s: float
    low_s: float  # a tenth of the samples is below
    high_s: float

    def __str__(self) -> str:
        low, median, high = (f"{x * 1e6:.1f}" for x in (self.low_s, self.median_s, self.high_s))
        return f"{median} us ({low}-{high})"


def _sample(run, calls) -> float:
    """Seconds a call; all are queued before the last is waited for."""
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def time_calls(run, samples=SAMPLES, sample=_sample) -> Timing:
    """Timing of run(), which returns what is to be waited for.

    Args:
        sample: (run, calls) -> seconds a call; of another framework, its own clock.
    """
    sample(run, 1)  # compiles
    calls = max(1, round(SAMPLE_S / max(sample(run, 3), 1e-9)))
    seconds = sorted(sample(run, calls) for _ in range(samples))
    tenth = samples // 10
    return Timing(statistics.median(seconds), seconds[tenth], seconds[-1 - tenth])

"""Times a function on a device: the median of many calls, compilation excluded."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SAMPLES = 20
SAMPLE_S = 5e-3  # a sample repeats the call for about this long, to hide the host's overhead


class Timing(NamedTuple):
    """The duration of one call."""

    median_s: float
    low_s: float  # 10th percentile of the samples
    high_s: float  # 90th percentile

    def __str__(self) -> str:
        low, median, high = (f"{x * 1e6:.1f}" for x in (self.low_s, self.median_s, self.high_s))
        return f"{median} us ({low}-{high})"

    def divided(self, calls: int) -> "Timing":
        """Returns the timing of one of `calls` equal parts of the call."""
        return Timing(*(x / calls for x in self))


def _time_sample(function, calls) -> float:
    """Returns seconds per call; it queues all calls before it waits for the last."""
    start = time.perf_counter()
    for _ in range(calls):
        out = function()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def time_calls(
    function: Callable[[], Any],
    samples: int = SAMPLES,
    time_sample: Callable[[Callable, int], float] = _time_sample,
) -> Timing:
    """Returns the timing of a function that returns JAX arrays.

    Args:
        time_sample: (function, calls) -> seconds per call; PyTorch is timed with its own.
    """
    time_sample(function, 1)  # compiles
    calls = max(1, round(SAMPLE_S / max(time_sample(function, 3), 1e-9)))
    seconds = sorted(time_sample(function, calls) for _ in range(samples))
    tenth = samples // 10
    return Timing(statistics.median(seconds), seconds[tenth], seconds[-1 - tenth])


def first_line(error: Exception) -> str:
    """Returns the type of an error and the first 200 characters of its first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def measure_ceilings(size: int = 8_192) -> dict[str, float]:
    """Returns the FLOP/s of a bfloat16 product and the bytes/s of a copy on this device."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.bfloat16))
    copy = jax.jit(lambda a: a + 1)
    return {
        "matmul_flops_per_s": 2 * size**3 / time_calls(lambda: product(a)).median_s,
        "copy_bytes_per_s": 2 * a.nbytes / time_calls(lambda: copy(a)).median_s,
    }

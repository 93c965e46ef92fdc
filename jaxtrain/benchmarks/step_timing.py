"""Times training steps on a device, in the same way for JAX and PyTorch.

This module imports neither framework.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.benchmarks.child import BenchJob
from jaxtrain.config.train_config import TrainConfig

WARM_UP_STEPS = 2
LEAST_STEPS, MOST_STEPS = 5, 20  # counted
SMI_TIMEOUT_S = 20.0  # without persistence mode, nvidia-smi first loads the driver
SMI_FIELDS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
)


def zipf_tokens(seed: int, batch: int, seq_len: int, V: int) -> np.ndarray:
    """Draws int32 [batch, seq_len + 1] with frequencies like text's: 1 / (r + 2.7) at rank r.

    Source: Mandelbrot 1953, as in Manning & Schuetze 1999, section 1.4.3.
    """
    share_V = 1 / (np.arange(V) + 2.7)
    edges_V = np.cumsum(share_V / share_V.sum())
    rng = np.random.default_rng(seed)
    rank = np.searchsorted(edges_V, rng.random((batch, seq_len + 1))).clip(max=V - 1)
    return np.random.default_rng(0).permutation(V)[rank].astype(np.int32)


def time_pipelined(
    launch: Callable[[Any], Any], wait: Callable[[Any], Any], batches: Iterable[Any]
) -> tuple[list[float], list[float]]:
    """Returns (seconds from each step's end to the next one's, CPU seconds of each launch).

    As in training, a step is launched before the last one is waited for. So the device never waits
    for the host, and the latency of the wait itself is not counted. The first step's time starts at
    its launch. Where a launch blocks until its step is almost done, the first time is that of
    almost two steps and the last one that of almost none; time_steps counts neither.

    The CPU time is that of the launching thread: an upper bound of the host's work, as some drivers
    spin while the device's queue is full.

    Args:
        launch: starts a step on a batch and returns what `wait` waits for.
    """
    steps_s, launches_s, in_flight = [], [], None
    ended_s = time.perf_counter()
    for batch in batches:
        start_s = time.thread_time()
        launched = launch(batch)
        launches_s.append(time.thread_time() - start_s)
        if in_flight is not None:
            wait(in_flight)
            steps_s.append(time.perf_counter() - ended_s)
            ended_s = time.perf_counter()
        in_flight = launched
    wait(in_flight)
    return [*steps_s, time.perf_counter() - ended_s], launches_s


def median_and_range(name: str, times_s: Sequence[float]) -> dict[str, Any]:
    """Returns {NAME_s: median, NAME_range_s: [10th percentile, 90th percentile]}."""
    low_s, median_s, high_s = np.percentile(times_s, (10, 50, 90)).tolist()
    return {f"{name}_s": median_s, f"{name}_range_s": [low_s, high_s]}


def time_steps(
    job: BenchJob, cfg: TrainConfig, launch: Callable[[Any], Any], wait: Callable[[Any], Any]
) -> dict[str, Any]:
    """Times a job's steps, each on new tokens; first_step_s counts from the child's start."""
    shape = job.batch, cfg.data.seq_len, cfg.model.V
    batches = lambda first, count: [zipf_tokens(first + i, *shape) for i in range(count)]
    wait(launch(batches(0, 1)[0]))
    first_step_s = time.time() - job.began
    warm_up_s, _ = time_pipelined(launch, wait, batches(1, WARM_UP_STEPS))
    # Where a launch blocks until its step is almost done, the last of these times is short.
    count = int(np.clip(job.most_s / max(warm_up_s), LEAST_STEPS, MOST_STEPS))
    times_s, launches_s = time_pipelined(launch, wait, batches(1 + WARM_UP_STEPS, count + 2))
    steps_s = times_s[1:-1]
    # One more step runs meanwhile, so that these are the clocks under load.
    in_flight = launch(batches(3 + WARM_UP_STEPS + count, 1)[0])
    clocks = gpu_clocks()
    wait(in_flight)
    p50_s, p95_s = np.percentile(steps_s, (50, 95)).tolist()
    return {
        "clocks": clocks,
        "first_step_s": first_step_s,
        "step_s": p50_s,
        "step_p95_s": p95_s,
        "steps_s": steps_s,
        "host_s": float(np.median(launches_s)),
        "samples": count,
        "tokens_per_step": job.batch * cfg.data.seq_len,
        "tokens_per_s": job.batch * cfg.data.seq_len / p50_s,
    }


def first_gpu(environ: Mapping[str, str]) -> str:
    """Returns the index or UUID, for nvidia-smi, of the GPU that a process sees first."""
    return environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def gpu_clocks() -> str:
    """Returns the first GPU's clocks, power and temperature, or why nvidia-smi reports none."""
    argv = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    argv.append(f"--id={first_gpu(os.environ)}")
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SMI_TIMEOUT_S)
    except FileNotFoundError:
        return "no nvidia-smi"
    except subprocess.TimeoutExpired:
        return f"nvidia-smi: no answer in {SMI_TIMEOUT_S:g} s"
    output = done.stdout.strip()
    return output if done.returncode == 0 else f"nvidia-smi: {done.stderr.strip() or output}"

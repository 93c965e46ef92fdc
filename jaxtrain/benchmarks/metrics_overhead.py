"""Suite metrics: what a step's measuring costs the thread that trains.

All that a run does to measure a step is done here as the loop does it, with a clock, a step log on
disk and one interface's counters, and no step between: two waits for the device less. Its CPU
time is set against steps of configs as they are shipped, timed in the same process.
"""

import importlib
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxtrain.benchmarks.timing import verdict
from jaxtrain.config import train_config as config_lib
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.metrics.collector import Collector
from jaxtrain.metrics.mfu import build_work, find_device_chip
from jaxtrain.metrics.network import NetworkCounters
from jaxtrain.metrics.step_log import StepLog
from jaxtrain.reporting.table import format_table
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import init_state

MOST = 0.005  # of a step
CASES = ("debug", "quickstart")
LOG_EVERY = 10  # steps, as TrainConfig has it
STEPS = 2_000  # measured of the metrics
INTERFACE = "lo"  # that every host has; a job of several hosts names its own
WARM_UP = 3


def _config(name):
    return config_lib.freeze(importlib.import_module(f"configs.{name}").get_config())


def _step_s(run, step, rounds) -> float:
    """Median wall seconds of a step that is waited for."""
    cfg, times_s = run.cfg, []
    state, rates = init_state(run.model, run.optimizer, run.mesh, cfg.seed), run.rates()
    rng = np.random.default_rng(0)
    for _ in range(WARM_UP + rounds):
        tokens = rng.integers(0, cfg.model.V, (cfg.data.batch, cfg.data.seq_len + 1), np.int32)
        batch = {"tokens": jax.device_put(tokens, batch_sharding(run.mesh))}
        jax.block_until_ready((state, batch))
        start_s = time.perf_counter()
        state, scalars = jax.block_until_ready(step(state, batch, rates))
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[WARM_UP:])


def cost_s(work, chip, steps=STEPS) -> tuple[float, float]:
    """(CPU, wall) seconds that measuring a step costs this thread."""
    with tempfile.TemporaryDirectory() as folder:
        log = StepLog(Path(folder), 0)
        counters = NetworkCounters(INTERFACE)
        with Collector(work, chip, log, counters, is_saving=lambda: False) as measure:
            measure.start({})
            cpu_s, wall_s = time.thread_time(), time.perf_counter()
            for step in range(1, steps + 1):
                with measure.pause("data"):
                    pass
                measure.tick(step, skipped=False)
                if step % LOG_EVERY == 0:
                    measure.summary()
            log.flush()
            return (time.thread_time() - cpu_s) / steps, (time.perf_counter() - wall_s) / steps


def run(rounds: int, cases=CASES) -> list[dict]:
    """A row of each config: its step, what measuring costs, and the share."""
    rows = []
    for name in cases:
        parts = build_run(_config(name), jax.devices()[:1])
        step = compile_step(parts)
        work = build_work(parts.cfg, parts.parameters, parts.mesh, step.compiled)
        chip = find_device_chip(parts.mesh.devices.flat[0])
        cpu_s, wall_s = cost_s(work, chip)
        row = {"suite": "metrics", "case": name, "cpu_s": cpu_s, "wall_s": wall_s}
        row |= {"step_s": _step_s(parts, step, rounds), "samples": rounds}
        rows.append(row | {"share": cpu_s / row["step_s"]})
    return rows


def show(rows) -> str:
    return format_table(
        rows,
        {
            "step of": lambda r: r["case"],
            "target": lambda r: verdict(100 * r["share"], 100 * MOST, at_most=True),
            "share": lambda r: f"{r['share']:.3%}",
            "cpu us": lambda r: f"{1e6 * r['cpu_s']:.1f}",
            "wall us": lambda r: f"{1e6 * r['wall_s']:.1f}",
            "step ms": lambda r: f"{1e3 * r['step_s']:.2f}",
            "n": lambda r: str(r["samples"]),
        },
    )

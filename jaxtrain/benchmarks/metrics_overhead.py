"""Suite metrics: the time that measuring a step costs the training thread.

It makes all calls by which the training loop measures a step, with a step log on disk and one
network interface's counters, but runs no step between them. Their CPU time is compared with the
steps of shipped configs, which are timed in the same process.
"""

import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtrain.benchmarks.dispatch import time_calls
from jaxtrain.benchmarks.timing import target_verdict
from jaxtrain.config import train_config as config_lib
from jaxtrain.metrics.collector import Collector
from jaxtrain.metrics.mfu import StepWork, build_work, find_device_chip
from jaxtrain.metrics.network import NetworkCounters
from jaxtrain.metrics.step_log import StepLog
from jaxtrain.reporting.table import format_table
from jaxtrain.training.run import build_run, compile_step
from pallas_kernels.chip import Chip

MOST_SHARE = 0.005  # of a step
CASES = ("debug", "quickstart")
LOG_EVERY = 10  # steps, TrainConfig's default
STEPS = 2_000  # for which the metrics are timed
INTERFACE = "lo"  # every host has it


def measuring_cost_s(work: StepWork, chip: Chip | None, steps: int = STEPS) -> tuple[float, float]:
    """Returns the (CPU, wall) seconds that measuring one step costs this thread."""
    with tempfile.TemporaryDirectory() as folder:
        log = StepLog(Path(folder), 0)
        counters = NetworkCounters(INTERFACE)
        with Collector(work, chip, log, counters, is_saving=lambda: False) as collector:
            collector.start({})
            cpu_s, wall_s = time.thread_time(), time.perf_counter()
            for step in range(1, steps + 1):
                with collector.pause("data"):
                    pass
                collector.tick(step, skipped=False)
                if step % LOG_EVERY == 0:
                    collector.summary()
            log.flush()
            return (time.thread_time() - cpu_s) / steps, (time.perf_counter() - wall_s) / steps


def measure(rounds: int, cases: Sequence[str] = CASES) -> list[dict[str, Any]]:
    """Returns a row for each config: its step time, the cost of measuring it, and the share."""
    rows = []
    for name in cases:
        cfg = config_lib.freeze(importlib.import_module(f"configs.{name}").get_config())
        run = build_run(cfg, jax.devices()[:1])
        step = compile_step(run)
        work = build_work(run.cfg, run.parameters, run.mesh, step.compiled)
        chip = find_device_chip(run.mesh.devices.flat[0])
        cpu_s, wall_s = measuring_cost_s(work, chip)
        row = {"suite": "metrics", "case": name, "cpu_s": cpu_s, "wall_s": wall_s}
        row |= {"step_s": time_calls(run, step, rounds)["whole_step_s"], "samples": rounds}
        rows.append(row | {"share": cpu_s / row["step_s"]})
    return rows


def tables(rows: Sequence[dict[str, Any]]) -> str:
    return format_table(
        rows,
        {
            "step of": lambda r: r["case"],
            "target": lambda r: target_verdict(100 * r["share"], 100 * MOST_SHARE, at_most=True),
            "share": lambda r: f"{r['share']:.3%}",
            "cpu us": lambda r: f"{1e6 * r['cpu_s']:.1f}",
            "wall us": lambda r: f"{1e6 * r['wall_s']:.1f}",
            "step ms": lambda r: f"{1e3 * r['step_s']:.2f}",
            "n": lambda r: r["samples"],
        },
    )

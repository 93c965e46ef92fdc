"""Suite dispatch: the time that Python takes to launch a step with 24 layers.

The device goes on working after the call has returned. The next call starts when that step has
ended, and this wait is not measured. On a CPU the device's threads may take the core that Python
runs on, which adds to the call's wall time but not to the calling thread's CPU time. So the target
is for the CPU time.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.benchmarks.timing import target_verdict
from jaxtrain.config.train_config import DataConfig, ModelConfig, TrainConfig
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.reporting.table import format_table
from jaxtrain.training.run import Run, build_run, compile_step
from jaxtrain.training.step import Step, init_state

MOST_S = 1e-3  # a step of the smallest models on a GPU takes 10 ms
WARM_UP = 10  # calls


def time_calls(run: Run, step: Step, rounds: int) -> dict[str, Any]:
    """Returns medians over `rounds` calls of a run's compiled step, each on new random tokens."""
    cfg, rates = run.cfg, run.rates()
    state = init_state(run.model, run.optimizer, run.mesh, cfg.seed)
    rng = np.random.default_rng(0)
    walls_s, cpus_s, whole_steps_s = [], [], []
    for _ in range(WARM_UP + rounds):
        tokens = rng.integers(0, cfg.model.V, (cfg.data.batch, cfg.data.seq_len + 1), np.int32)
        batch = {"tokens": jax.device_put(tokens, batch_sharding(run.mesh))}
        jax.block_until_ready((state, batch))
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        state, scalars = step(state, batch, rates)
        walls_s.append(time.perf_counter() - wall_s)
        cpus_s.append(time.thread_time() - cpu_s)
        jax.block_until_ready((state, scalars))
        whole_steps_s.append(time.perf_counter() - wall_s)
    median = lambda values: statistics.median(values[WARM_UP:])
    return {
        "leaves": len(jax.tree.leaves(state)),
        "wall_s": median(walls_s),
        "wall_min_s": min(walls_s[WARM_UP:]),
        "cpu_s": median(cpus_s),
        "whole_step_s": median(whole_steps_s),
        "samples": rounds,
    }


def measure(rounds: int, layers: int = 24) -> list[dict[str, Any]]:
    """Returns one row: the times of a narrow model's step with Muon."""
    cfg = TrainConfig(
        model=ModelConfig(L=layers, D=8, H=1, G=1, K=8, F=8, V=16, dtype="float32"),
        data=DataConfig(batch=1, seq_len=8),
    )
    run = build_run(cfg, jax.devices("cpu")[:1])
    step = compile_step(run)
    row = {"suite": "dispatch", "case": f"{layers} layers, muon", "compile_s": step.compile_s}
    return [row | time_calls(run, step, rounds)]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    return format_table(
        rows,
        {
            "case": lambda r: r["case"],
            "target": lambda r: target_verdict(1e3 * r["cpu_s"], 1e3 * MOST_S, at_most=True),
            "cpu ms": lambda r: f"{1e3 * r['cpu_s']:.3f}",
            "wall ms": lambda r: f"{1e3 * r['wall_s']:.3f}",
            "wall min": lambda r: f"{1e3 * r['wall_min_s']:.3f}",
            "whole step ms": lambda r: f"{1e3 * r['whole_step_s']:.2f}",
            "arrays": lambda r: r["leaves"],
            "compile s": lambda r: f"{r['compile_s']:.1f}",
            "n": lambda r: r["samples"],
        },
    )

"""Suite dispatch: Python time of a step at 24 layers, that is, until the call returns.

The device works on behind the call, so nothing waits for it; between turns it is waited for,
outside the measurement. On a CPU the device's threads may take the core that Python is on, which
the wall time of the call then holds; the calling thread's CPU time does not, and is what counts.
"""

import statistics
import time

import jax
import numpy as np

from jaxtrain.benchmarks.timing import verdict
from jaxtrain.config.train_config import DataConfig, ModelConfig, TrainConfig
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.reporting.table import format_table
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import init_state

MOST_S = 1e-3  # a step of the smallest models on a GPU is 10 ms
WARM_UP = 10  # calls


def run(rounds: int, layers: int = 24) -> list[dict]:
    """One row: medians over `rounds` calls of the compiled step of a narrow Muon model."""
    cfg = TrainConfig(
        model=ModelConfig(L=layers, D=8, H=1, G=1, K=8, F=8, V=16, dtype="float32"),
        data=DataConfig(batch=1, seq_len=8),
    )
    parts = build_run(cfg, jax.devices("cpu")[:1])
    state = init_state(parts.model, parts.optimizer, parts.mesh, cfg.seed)
    leaves = len(jax.tree.leaves(state))
    step, rates = compile_step(parts), parts.rates()
    rng = np.random.default_rng(0)
    walls_s, cpus_s, wholes_s = [], [], []
    for _ in range(WARM_UP + rounds):
        tokens = rng.integers(0, cfg.model.V, (1, 9), np.int32)
        batch = {"tokens": jax.device_put(tokens, batch_sharding(parts.mesh))}
        jax.block_until_ready((state, batch))
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        state, scalars = step(state, batch, rates)
        walls_s.append(time.perf_counter() - wall_s)
        cpus_s.append(time.thread_time() - cpu_s)
        jax.block_until_ready((state, scalars))
        wholes_s.append(time.perf_counter() - wall_s)
    median = lambda values: statistics.median(values[WARM_UP:])
    row = {"suite": "dispatch", "case": f"{layers} layers, muon", "leaves": leaves}
    row |= {"wall_s": median(walls_s), "wall_min_s": min(walls_s[WARM_UP:])}
    row |= {"cpu_s": median(cpus_s), "whole_step_s": median(wholes_s), "samples": rounds}
    return [row | {"compile_s": step.compile_s}]


def show(rows) -> str:
    return format_table(
        rows,
        {
            "case": lambda r: r["case"],
            "target": lambda r: verdict(1e3 * r["cpu_s"], 1e3 * MOST_S, at_most=True),
            "cpu ms": lambda r: f"{1e3 * r['cpu_s']:.3f}",
            "wall ms": lambda r: f"{1e3 * r['wall_s']:.3f}",
            "wall min": lambda r: f"{1e3 * r['wall_min_s']:.3f}",
            "whole step ms": lambda r: f"{1e3 * r['whole_step_s']:.2f}",
            "arrays": lambda r: str(r["leaves"]),
            "compile s": lambda r: f"{r['compile_s']:.1f}",
            "n": lambda r: str(r["samples"]),
        },
    )

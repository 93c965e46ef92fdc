"""The child process that runs JAX: the device's ceilings, our training step, losses on text."""

import importlib.metadata
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.benchmarks.child import BenchJob, child_main, job_config
from jaxtrain.benchmarks.step_timing import (
    median_and_range,
    time_pipelined,
    time_steps,
    zipf_tokens,
)
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.metrics.work_kinds import find_causes
from jaxtrain.model.trees import named_leaves
from jaxtrain.planning.compiled import peak_bytes
from jaxtrain.reporting.profile_trace import CAUSES, find_traces, read_trace
from jaxtrain.training.run import Run, build_run, compile_step
from jaxtrain.training.step import Step, TrainState, init_state
from pallas_kernels.hlo import Program
from pallas_kernels.timing import measure_ceilings

UPDATES, SKIPPED_UPDATES = 12, 2  # of the optimizer's own program; the first two do not count
TRACED_STEPS = 2


def is_oom(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def first_device(job: BenchJob) -> Any:
    """Returns the first device.

    Raises:
        RuntimeError: it is not a GPU, and the job is not tiny.
    """
    device = jax.devices()[0]
    if not job.tiny and device.platform != "gpu":
        raise RuntimeError(
            f"JAX runs on {device.platform}, so its figures would be another device's. Run pip "
            'install -e ".[cuda12]" (or cuda13), and leave JAX_PLATFORMS unset.'
        )
    return device


def describe_device(job: BenchJob) -> dict[str, Any]:
    """Returns the device and what a large matrix product and a copy reach on it."""
    device = first_device(job)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "bytes_limit": (device.memory_stats() or {}).get("bytes_limit", 0),
        **measure_ceilings(256 if job.tiny else 8_192),
    }


class JaxStep:
    """The compiled training step and its state."""

    def __init__(self, cfg: TrainConfig, devices: Sequence[Any], options: dict | None = None):
        self.run = build_run(cfg, devices)
        self.step = compile_step(self.run, options)
        self._rates, self._sharding = self.run.rates(), batch_sharding(self.run.mesh)
        self.state: TrainState | None = None

    def init(self, seed: int | None = None) -> TrainState:
        """Makes the first state; None takes the config's seed."""
        run, seed = self.run, self.run.cfg.seed if seed is None else seed
        self.state = init_state(run.model, run.optimizer, run.mesh, seed)
        return self.state

    def launch(self, tokens_BT1: np.ndarray | jax.Array) -> jax.Array:
        """Starts a step and returns its loss, which is not computed yet."""
        batch = {"tokens": jax.device_put(tokens_BT1, self._sharding)}
        self.state, scalars = self.step(self.state, batch, self._rates)
        return scalars["train/loss_nats"]

    def __call__(self, tokens_BT1: np.ndarray) -> float:
        """Runs a step to its end and returns its loss."""
        return float(jax.block_until_ready((self.launch(tokens_BT1), self.state))[0])


def time_optimizer(run: Run, state: TrainState) -> dict[str, Any]:
    """Times the optimizer as a separate program; donates the state. See gpu_results.step_shares.

    Like steps, an update is launched before the last one is waited for, as waiting takes time too.
    """

    def update(params, opt_state, grads, rates):
        good = jnp.ones((), bool)
        updates, opt_state = run.optimizer.update(grads, opt_state, params, good=good, rates=rates)
        params = optax.apply_updates(params, updates)
        # The caller waits for one number, as the new arrays are donated to the next update.
        return params, opt_state, jax.tree.leaves(params)[0].ravel()[0]

    params, opt_state = state.params, state.opt_state
    # The values of the gradients do not change the time.
    grads, rates = jax.tree.map(jnp.copy, params), run.rates()
    step = Step(jax.jit(update, donate_argnums=(0, 1)), params, opt_state, grads, rates)

    def launch(_):
        nonlocal params, opt_state
        params, opt_state, done = step(params, opt_state, grads, rates)
        return done

    times_s, launches_s = time_pipelined(launch, jax.block_until_ready, range(UPDATES))
    launch_s = statistics.median(launches_s[SKIPPED_UPDATES:])
    return median_and_range("optimizer", times_s[SKIPPED_UPDATES:]) | {"optimizer_host_s": launch_s}


def trace_steps(job: BenchJob, cfg: TrainConfig, jax_step: JaxStep) -> dict[str, Any]:
    """Stores a trace of two steps; returns the device's idle share in it, or why there is none."""
    try:
        tokens = zipf_tokens(0, job.batch, cfg.data.seq_len, cfg.model.V)
        with jax.profiler.trace(job.trace):
            jax.block_until_ready([jax_step.launch(tokens) for _ in range(TRACED_STEPS)])
        causes = find_causes(Program(jax_step.step.compiled.as_text()))
        write_atomic(Path(job.trace) / CAUSES, strict_json(causes))
        traced = read_trace(find_traces(job.trace)[0])
        return {"idle_share": traced.devices[0].idle_share}
    except Exception as error:  # of any kind: the steps are measured, the optimizer comes next
        return {"no_trace": f"{type(error).__name__}: {error}"[:300]}


def train(job: BenchJob) -> Iterator[dict[str, Any]]:
    """Yields the times and the memory of our step, also with the optimizer's time; see time_steps.

    The figures of the step come first: a trace can take long to read, and the optimizer's program
    needs memory of its own.
    """
    cfg = job_config(job)
    start_runtime(cfg)
    device = first_device(job)
    jax_step = JaxStep(cfg, [device], job.options)
    planned = peak_bytes(jax_step.step.compiled)
    if job.usable_bytes and planned > job.usable_bytes:
        yield {"oom": f"the compiled step needs {planned} bytes of {job.usable_bytes}"}
        return
    jax_step.init()
    result = time_steps(job, cfg, jax_step.launch, float)
    result |= {"compile_s": jax_step.step.compile_s, "planned_bytes": planned}
    result["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    result["routes"] = {op: route.implementation for op, route in jax_step.run.routes.items()}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    yield (result := result | {"versions": versions})
    if job.trace:
        yield (result := result | trace_steps(job, cfg, jax_step))
    assert jax_step.state is not None
    yield result | time_optimizer(jax_step.run, jax_step.state)


def train_losses(job: BenchJob) -> dict[str, Any]:
    """Returns each seed's losses on real text; writes its first weights for the PyTorch child."""
    cfg, losses = job_config(job), {}
    start_runtime(cfg)
    corpus = open_corpus(cfg.data, "train", cfg.model.V, Path(job.folder))
    step = JaxStep(cfg, [first_device(job)])
    for seed in job.seeds:
        params = named_leaves(step.init(seed).params)
        arrays = {name: np.asarray(x) for name, x in params.items()}
        np.savez(Path(job.folder) / f"weights_{seed}.npz", allow_pickle=False, **arrays)
        with build_batches(cfg.data, corpus, step.run.mesh, seed) as batches:
            nats = [step.launch(next(batches)["tokens"]) for _ in range(job.steps)]
        losses[str(seed)] = [float(x) for x in nats]
    shards = [str(shard.path) for shard in corpus.shards]
    return {"losses": losses, "shards": shards, "data": corpus.describe()}


KINDS = {"about": describe_device, "train": train, "losses": train_losses}

if __name__ == "__main__":
    child_main(KINDS, is_oom)

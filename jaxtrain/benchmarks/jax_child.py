"""A child that holds JAX: ceilings, our training step, losses on real text. See job.py."""

import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

from jaxtrain.benchmarks.child import (
    child_main,
    config_of,
    measure_steps,
    pace,
    spread,
    zipf_tokens,
)
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import Step, init_state
from pallas_kernels.bench import measure_ceilings

UPDATES, FIRST = 12, 2  # updates by the optimizer alone, of which the first are not counted
TRACED = 2  # steps of a trace


def is_oom(error) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def device_of(job):
    """The device. Raises RuntimeError where it is no GPU and the job is no trial."""
    device = jax.devices()[0]
    if not job.tiny and device.platform != "gpu":
        raise RuntimeError(
            f"JAX runs on {device.platform}, so its figures would be another device's. Run pip "
            'install -e ".[cuda12]" (or cuda13), and leave JAX_PLATFORMS unset.'
        )
    return device


def about(job) -> dict:
    """The device and what its matrix product and copy reach."""
    device = device_of(job)
    found = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return found | {"bytes_limit": limit} | measure_ceilings(256 if job.tiny else 8_192)


def planned_bytes(compiled) -> int:
    """Peak memory by the compiler, as jaxtrain.plan reads it."""
    found = compiled.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


def optimizer_times(run, state) -> dict:
    """Seconds of the optimizer alone, a program of its own; see gpu_rows.shares. Takes the state.

    Updates are launched as steps are, one ahead: waiting for each would count the wait.
    """

    def update(params, opt_state, grads, rates):
        good = jnp.ones((), bool)
        updates, opt_state = run.optimizer.update(grads, opt_state, params, good=good, rates=rates)
        params = optax.apply_updates(params, updates)
        return params, opt_state, jax.tree.leaves(params)[0].ravel()[0]  # to wait for

    grads = jax.tree.map(jnp.copy, state.params)  # random like gradients; no value changes a time
    given = state.params, state.opt_state, grads, run.rates()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given
    )
    step = Step(jax.jit(update, donate_argnums=(0, 1)), *abstract)
    held = list(given)

    def launch(_):
        *held[:2], done = step(*held)
        return done

    times_s, hosts_s = pace(launch, jax.block_until_ready, range(UPDATES))
    host_s = statistics.median(hosts_s[FIRST:])
    return spread("optimizer", times_s[FIRST:]) | {"optimizer_host_s": host_s}


class JaxStep:
    """The compiled step and its state, launched without a wait."""

    def __init__(self, run, step):
        self.run, self.step, self.rates = run, step, run.rates()
        self.state = init_state(run.model, run.optimizer, run.mesh, run.cfg.seed)
        self.place = batch_sharding(run.mesh)

    def launch(self, tokens_BT1):
        batch = {"tokens": jax.device_put(tokens_BT1, self.place)}
        self.state, scalars = self.step(self.state, batch, self.rates)
        return scalars["train/loss_nats"]


def train(job) -> dict:
    """Times, memory and the optimizer's share of our step; see job.measure_steps."""
    cfg = config_of(job)
    start_runtime(cfg)
    device = device_of(job)
    run = build_run(cfg, [device])
    step = compile_step(run, job.options)
    planned = planned_bytes(step.compiled)
    if job.usable_bytes and planned > job.usable_bytes:
        return {"oom": f"the compiled step wants {planned} bytes of {job.usable_bytes}"}
    ours = JaxStep(run, step)
    found = measure_steps(job, cfg, ours.launch, float)
    found |= {"compile_s": step.compile_s, "planned_bytes": planned}
    found["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    found["routes"] = {op: route.implementation for op, route in run.routes.items()}
    if job.trace:
        tokens = zipf_tokens(0, job.batch, cfg.data.seq_len, cfg.model.V)
        with jax.profiler.trace(job.trace):
            jax.block_until_ready([ours.launch(tokens) for _ in range(TRACED)])
    found |= optimizer_times(run, ours.state)
    return found | {"versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__}}


def losses(job) -> dict:
    """Each seed's training losses on real text; its first weights go to job.folder for the twin."""
    cfg, found = config_of(job), {}
    start_runtime(cfg)
    run = build_run(cfg, [device_of(job)])
    corpus = open_corpus(cfg.data, "train", cfg.model.V, Path(job.folder))
    step, rates = compile_step(run), run.rates()
    for seed in job.seeds:
        state = init_state(run.model, run.optimizer, run.mesh, seed)
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        named = {"/".join(key.key for key in path): np.asarray(x) for path, x in leaves}
        np.savez(Path(job.folder) / f"weights_{seed}.npz", **named)
        nats = []
        with build_batches(cfg.data, corpus, run.mesh, seed) as batches:
            for _ in range(job.steps):
                state, scalars = step(state, next(batches), rates)
                nats.append(scalars["train/loss_nats"])
        found[str(seed)] = [float(x) for x in nats]
    shards = [str(shard.path) for shard in corpus.shards]
    return {"losses": found, "shards": shards, "data": corpus.describe()}


KINDS = {"about": about, "train": train, "losses": losses}

if __name__ == "__main__":
    child_main(KINDS, is_oom)

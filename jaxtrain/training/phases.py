"""Measures the phases of a step: each compiled and timed separately, and how much they overlap.

    forward            the loss of a device's own rows
    forward_backward   that loss and its gradient, before the exchange
    exchange           the collectives of the gradient, one after another, with no computation
    optimizer          the update from exchanged gradients, with its own collectives
    whole              a step of the run, median
    overlap            forward_backward + exchange + optimizer - whole
    exposed            the part of exchange that nothing hides: whole - forward_backward - optimizer

With mesh.tensor above 1, matrix products are split over devices, and none can compute its rows
without the others: forward and forward_backward then include their collectives, and overlap and
exposed are not reported.
"""

import dataclasses
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.config.train_config import MeshConfig
from jaxtrain.distributed.mesh import BATCH_AXES, replicated
from jaxtrain.metrics.hlo_collectives import Collective, find_collectives
from jaxtrain.metrics.names import PHASES
from jaxtrain.model.transformer import Model
from jaxtrain.training.batch_arrays import microbatches, target_weights
from jaxtrain.training.run import Run, build_run
from jaxtrain.training.step import TrainState, batch_loss, build_gradient, state_sharding_tree
from pallas_kernels.hlo import Program

ROUNDS, WARM_UP = 10, 2  # timed calls of each phase, and untimed ones before them
AFTER_STEPS = 20  # of this start, so that the run is at steady state
FLOAT_BYTES = 4


def build_forward(model: Model, loss: Callable, accumulation: int) -> Callable:
    """Returns forward(params, batch) -> nats, computed in microbatches as in build_gradient."""

    def forward(params, batch):
        weights = target_weights(batch)
        weights = weights / jnp.maximum(weights.sum(), 1)
        nats_of = lambda part: batch_loss(model, loss, params, *part)[1]
        if accumulation == 1:
            return nats_of((batch, weights))
        split = lambda x: microbatches(x, accumulation)
        return jax.lax.map(nats_of, (jax.tree.map(split, batch), split(weights))).sum()

    return forward


def _build_single_device_run(run: Run) -> Run | None:
    """Returns the Run that computes one device's rows; None if tensor parallelism splits them."""
    if run.mesh.shape["tensor"] > 1:
        return None
    rows = run.mesh.shape["replica"] * run.mesh.shape["fsdp"]
    cfg = dataclasses.replace(
        run.cfg,
        mesh=MeshConfig(1, 1, 1),
        model=dataclasses.replace(run.cfg.model, remat=run.remat),
        data=dataclasses.replace(run.cfg.data, batch=run.cfg.data.batch // rows),
    )
    return build_run(cfg, list(run.mesh.local_devices[:1]))


def build_exchange(collectives: Sequence[Collective], mesh: Mesh) -> Callable:
    """Returns exchange(x) -> float32 [], which runs these collectives on float32 data in turn.

    Each one's input is computed from the output of the one before, so that XLA neither merges them
    nor runs two at once.
    """
    counts = Counter()
    for c in collectives:
        counts[c.kind, c.axes, c.size, c.payload_bytes] += c.times

    def run_collective(kind, axes, size, payload_bytes, x):
        numbers = max(payload_bytes // FLOAT_BYTES // size, 1) * size
        payload = jnp.full(numbers, x)
        ring = [(i, (i + 1) % size) for i in range(size)]
        out = {
            "all-reduce": lambda: jax.lax.psum(payload, axes),
            "all-gather": lambda: jax.lax.all_gather(payload[: numbers // size], axes, tiled=True),
            "reduce-scatter": lambda: jax.lax.psum_scatter(payload, axes, tiled=True),
            "all-to-all": lambda: jax.lax.all_to_all(payload, axes, 0, 0, tiled=True),
            "collective-permute": lambda: jax.lax.ppermute(payload, axes[0], ring),
        }[kind]()
        return out[0] / size

    def run_all(x):
        for key, times in counts.items():
            run = functools.partial(run_collective, *key)
            x = jax.lax.fori_loop(0, times, lambda i, x, run=run: run(x), x)
        return x

    return jax.jit(jax.shard_map(run_all, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))


def _median_s(function: Callable, *args) -> float:
    """Returns the median seconds of a call, after warm-up."""
    times_s = []
    for _ in range(WARM_UP + ROUNDS):
        start_s = time.perf_counter()
        jax.block_until_ready(function(*args))
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[WARM_UP:])


def _jit_on_own_rows(function: Callable, mesh: Mesh) -> Callable:
    """Jits a function of (replicated params, a device's own rows) that exchanges nothing.

    shard_map hands each device its rows as a whole batch. check_vma is off because the results
    differ between devices although out_specs call them replicated; they are only timed.
    """
    if mesh.size == 1:
        return jax.jit(function)
    in_specs = (P(), P(BATCH_AXES))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
    )


def _build_update(run: Run) -> Callable:
    """Returns update(grads, opt_state, params, rates) -> (params, opt_state); donates nothing."""
    shardings = state_sharding_tree(run.model, run.optimizer, run.mesh)

    def update(grads, opt_state, params, rates):
        updates, opt_state = run.optimizer.update(grads, opt_state, params, good=True, rates=rates)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(update, out_shardings=(shardings.params, shardings.opt_state))


def measure_phases(
    run: Run, state: TrainState, batch: dict, rates: dict[str, jax.Array], whole_s: float
) -> dict[str, float]:
    """Returns {"perf/phase_NAME_s": seconds} of this process, and the exchange's bandwidths.

    Needs memory for a second state, and for whole parameters and gradients on each device.

    Args:
        state, batch, rates: the arguments of a step; nothing is donated.
        whole_s: seconds that a step of the run takes.
    """
    mesh, parts = run.mesh, run.cfg.accumulation
    shardings = state_sharding_tree(run.model, run.optimizer, mesh).params
    # The gradient as the step computes it: its compiled text has the collectives of the exchange.
    gradient = build_gradient(run.model, run.loss, parts, shardings if mesh.size > 1 else None)
    compiled = jax.jit(lambda *args: gradient(*args)[2], out_shardings=shardings)
    compiled = compiled.lower(state.params, batch).compile()
    grads = jax.block_until_ready(compiled(state.params, batch))
    single_device_run = _build_single_device_run(run)
    params, own = state.params, single_device_run or run
    if single_device_run:
        params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(params)
        jit = functools.partial(_jit_on_own_rows, mesh=mesh)
        own_gradient = build_gradient(own.model, own.loss, parts)
    else:
        jit, own_gradient = jax.jit, gradient
    seconds = {
        "forward": _median_s(jit(build_forward(own.model, own.loss, parts)), params, batch),
        "forward_backward": _median_s(jit(lambda *args: own_gradient(*args)[2]), params, batch),
        "optimizer": _median_s(_build_update(run), grads, state.opt_state, state.params, rates),
        "whole": whole_s,
    }
    figures = {}
    collectives = find_collectives(Program(compiled.as_text() or ""), mesh)
    if collectives:
        exchange = build_exchange(collectives, mesh)
        seconds["exchange"] = exchange_s = _median_s(exchange, jnp.float32(1))
        payload = sum(c.times * c.payload_bytes for c in collectives)
        figures["comm/algbw_bytes_per_s"] = payload / exchange_s
        figures["comm/busbw_bytes_per_s"] = sum(c.wire_bytes for c in collectives) / exchange_s
    if single_device_run:
        work_s = seconds["forward_backward"] + seconds["optimizer"]
        seconds["overlap"] = work_s + seconds.get("exchange", 0.0) - whole_s
        if collectives:
            seconds["exposed"] = whole_s - work_s
    named = {f"perf/phase_{name}_s": seconds[name] for name in PHASES if name in seconds}
    return named | figures


def show_phases(figures: dict[str, float]) -> list[str]:
    """Returns the lines of a table: each phase, its time and its share of the whole step."""
    whole_s, lines = figures["perf/phase_whole_s"], []
    for name, seconds in figures.items():
        if name.startswith("perf/phase_"):
            part = name.removeprefix("perf/phase_").removesuffix("_s")
            lines.append(f"phase  {part:18}{seconds * 1e3:10.2f} ms  {seconds / whole_s:6.1%}")
    if "perf/phase_overlap_s" not in figures:
        lines.append("phase  no overlap: with mesh.tensor the phases include collectives")
    for name in ("algbw", "busbw"):
        if rate := figures.get(f"comm/{name}_bytes_per_s"):
            lines.append(f"phase  {name:18}{rate / 1e6:10.2f} MB/s during the exchange")
    return lines

"""The split of a step: its parts compiled and timed alone, at steady state, and how they overlap.

    forward            the loss of a device's own rows
    forward_backward   and its gradient, none exchanged
    exchange           the collectives of the gradient, one after another, with nothing beside them
    optimizer          the update from exchanged gradients, with its own collectives
    whole              a step of the run, median
    overlap            what the sum of forward_backward, exchange and optimizer is above the whole
    exposed            of the exchange: the whole without forward_backward and optimizer

Where a matrix product is split (mesh.tensor above 1) no device can do its part alone: forward and
forward_backward then hold their collectives, and there is no overlap and no exposed time.
"""

import dataclasses
import functools
import statistics
import time
from collections import Counter

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxtrain.config.train_config import MeshConfig
from jaxtrain.distributed.mesh import BATCH_AXES, replicated
from jaxtrain.metrics.hlo_collectives import find_collectives
from jaxtrain.metrics.names import PHASES
from jaxtrain.training.run import build_run
from jaxtrain.training.step import (
    batch_loss,
    build_gradient,
    microbatches,
    state_sharding_tree,
    target_weights,
)
from pallas_kernels.hlo import Program

ROUNDS, WARM_UP = 10, 2  # calls of each part that count, and before them
AFTER_STEPS = 20  # of the run, until it is at steady state
FLOAT_BYTES = 4


def build_forward(model, loss, accumulation):
    """forward(params, batch) -> nats, in microbatches."""

    def forward(params, batch):
        weights = target_weights(batch)
        weights = weights / jnp.maximum(weights.sum(), 1)
        one = lambda part: batch_loss(model, loss, params, *part)[1]
        if accumulation == 1:
            return one((batch, weights))
        split = lambda x: microbatches(x, accumulation)
        return jax.lax.map(one, (jax.tree.map(split, batch), split(weights))).sum()

    return forward


def _alone(run):
    """The Run of one device's rows, or None where a device has no part of its own."""
    if run.mesh.shape["tensor"] > 1:
        return None
    rows = run.mesh.shape["replica"] * run.mesh.shape["fsdp"]
    cfg = dataclasses.replace(
        run.cfg,
        mesh=MeshConfig(1, 1, 1),
        data=dataclasses.replace(run.cfg.data, batch=run.cfg.data.batch // rows),
    )
    return build_run(cfg, list(run.mesh.local_devices[:1]))


def build_exchange(collectives, mesh):
    """exchange(x) -> float32 []: these collectives of float32, each after the one before."""
    counts = Counter()
    for c in collectives:
        counts[c.kind, c.axes, c.size, c.payload_bytes] += c.times

    def once(kind, axes, size, payload_bytes, x):
        numbers = max(payload_bytes // FLOAT_BYTES // size, 1) * size
        whole = jnp.full(numbers, x)
        ring = [(i, (i + 1) % size) for i in range(size)]
        out = {
            "all-reduce": lambda: jax.lax.psum(whole, axes),
            "all-gather": lambda: jax.lax.all_gather(whole[: numbers // size], axes, tiled=True),
            "reduce-scatter": lambda: jax.lax.psum_scatter(whole, axes, tiled=True),
            "all-to-all": lambda: jax.lax.all_to_all(whole, axes, 0, 0, tiled=True),
            "collective-permute": lambda: jax.lax.ppermute(whole, axes[0], ring),
        }[kind]()
        return out[0] / size

    def local(x):
        for key, times in counts.items():
            again = functools.partial(once, *key)
            x = jax.lax.fori_loop(0, times, lambda i, x, again=again: again(x), x)
        return x

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))


def _median_s(function, *args) -> float:
    times_s = []
    for _ in range(WARM_UP + ROUNDS):
        start_s = time.perf_counter()
        jax.block_until_ready(function(*args))
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[WARM_UP:])


def _on_own_rows(function, mesh):
    """The function on whole parameters and each device's rows; nothing is exchanged."""
    if mesh.size == 1:
        return jax.jit(function)
    local = jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(BATCH_AXES)), out_specs=P(), check_vma=False
    )
    return jax.jit(local)


def _update(run):
    """update(grads, opt_state, params, rates) -> (params, opt_state), jitted, nothing donated."""
    shardings = state_sharding_tree(run.model, run.optimizer, run.mesh)

    def update(grads, opt_state, params, rates):
        updates, opt_state = run.optimizer.update(grads, opt_state, params, good=True, rates=rates)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(update, out_shardings=(shardings.params, shardings.opt_state))


def measure_phases(run, state, batch, rates, whole_s: float) -> dict[str, float]:
    """{"perf/phase_NAME_s": seconds} of this process, and the exchange's bandwidths.

    Needs memory for a second state, and for whole parameters and gradients on each device.

    Args:
        state, batch, rates: of a step; nothing is donated.
        whole_s: what a step of the run takes.
    """
    mesh, parts = run.mesh, run.cfg.accumulation
    shardings = state_sharding_tree(run.model, run.optimizer, mesh).params
    gradient = build_gradient(run.model, run.loss, parts, shardings if mesh.size > 1 else None)
    compiled = jax.jit(lambda *args: gradient(*args)[2], out_shardings=shardings)
    compiled = compiled.lower(state.params, batch).compile()
    grads = jax.block_until_ready(compiled(state.params, batch))
    alone = _alone(run)
    params, own = state.params, alone or run
    if alone:
        params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(params)
        wrap = functools.partial(_on_own_rows, mesh=mesh)
        own_gradient = build_gradient(own.model, own.loss, parts)
    else:
        wrap, own_gradient = jax.jit, gradient
    seconds = {
        "forward": _median_s(wrap(build_forward(own.model, own.loss, parts)), params, batch),
        "forward_backward": _median_s(wrap(lambda *a: own_gradient(*a)[2]), params, batch),
        "optimizer": _median_s(_update(run), grads, state.opt_state, state.params, rates),
        "whole": whole_s,
    }
    figures = {}
    collectives = find_collectives(Program(compiled.as_text()), mesh)
    if collectives:
        exchange = build_exchange(collectives, mesh)
        seconds["exchange"] = exchange_s = _median_s(exchange, jnp.float32(1))
        payload = sum(c.times * c.payload_bytes for c in collectives)
        figures["comm/algbw_bytes_per_s"] = payload / exchange_s
        figures["comm/busbw_bytes_per_s"] = sum(c.wire_bytes for c in collectives) / exchange_s
    if alone:
        work_s = seconds["forward_backward"] + seconds["optimizer"]
        seconds["overlap"] = work_s + seconds.get("exchange", 0.0) - whole_s
        if collectives:
            seconds["exposed"] = whole_s - work_s
    named = {f"perf/phase_{name}_s": seconds[name] for name in PHASES if name in seconds}
    return named | figures


def show_phases(figures: dict) -> list[str]:
    """The split as lines of a table, each part with its share of the whole."""
    whole_s, lines = figures["perf/phase_whole_s"], []
    for name, seconds in figures.items():
        if name.startswith("perf/phase_"):
            part = name.removeprefix("perf/phase_").removesuffix("_s")
            lines.append(f"phase  {part:18}{seconds * 1e3:10.2f} ms  {seconds / whole_s:6.1%}")
    if "perf/phase_overlap_s" not in figures:
        lines.append("phase  no overlap: mesh.tensor splits products, so parts hold collectives")
    for name in ("algbw", "busbw"):
        if rate := figures.get(f"comm/{name}_bytes_per_s"):
            lines.append(f"phase  {name:18}{rate / 1e6:10.2f} MB/s of the exchange alone")
    return lines

"""One training step: microbatches in a scan, one optimizer update, compiled once, donated.

A step whose loss or gradient is not finite changes neither parameters nor optimizer state; it is
counted. Nothing in here waits for the device.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.distributed.mesh import batch_sharding, param_sharding, platform, replicated
from jaxtrain.model.transformer import head_weights
from jaxtrain.optim.build import state_shardings, update_rms_by_group

# XLA's CPU scheduler otherwise spends memory on parallelism that the thread pool has no use for:
# 11.7 GB of temporaries against 7.2 at 1.4B parameters with Muon, the same step time at 3.5M.
CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_copy_insertion_use_region_analysis": True,
}


class TrainState(NamedTuple):
    step: jax.Array  # int32, batches consumed
    params: Any  # fp32 masters, nested dict
    opt_state: Any
    bad_steps: jax.Array  # int32, skipped in a row
    skipped_steps: jax.Array  # int32, skipped in all


class Recompiled(ValueError):
    """The step was called with arguments other than those it was compiled for."""


class Step:
    """A jitted function compiled ahead of time; other argument types are an error, not a compile.

    compile_s is what lowering and compiling took.

    Args:
        options: of XLA, on a GPU.
    """

    def __init__(self, function, *abstract, options=None):
        start = time.perf_counter()
        self._abstract = abstract
        lowered = function.lower(*abstract)
        options = CPU_OPTIONS if platform() == "cpu" else options
        self.compiled = lowered.compile(compiler_options=options)
        self.compile_s = time.perf_counter() - start

    def __call__(self, *args):
        try:
            return self.compiled(*args)
        except (TypeError, ValueError) as error:
            changed = _changed(self._abstract, args)
            if not changed:
                raise
            raise Recompiled(
                f"the step is compiled once; got other arguments: {'; '.join(changed[:4])}."
            ) from error


def _changed(abstract, args):
    """`path: was -> is` of the leaves whose shape, dtype or presence differs."""
    table = lambda tree: {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    was, now = table(abstract), table(args)
    keys = sorted(was.keys() | now.keys())
    return [
        f"{key}: {was.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in keys
        if was.get(key) != now.get(key)
    ]


def state_sharding_tree(model, optimizer, mesh) -> TrainState:
    """Shardings of a TrainState; optimizer moments may be split further than their parameters."""
    params = jax.tree.map(lambda a, s: param_sharding(a, s.shape, mesh), model.axes, model.shapes)
    whole = replicated(mesh)
    opt_state = state_shardings(optimizer, model.axes, model.shapes, mesh)
    return TrainState(whole, params, opt_state, whole, whole)


def abstract_state(model, optimizer, mesh) -> TrainState:
    """The TrainState as ShapeDtypeStructs with shardings, for compiling and restoring."""
    state = jax.eval_shape(lambda: _new_state(model.init(jax.random.key(0)), optimizer))
    shardings = state_sharding_tree(model, optimizer, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def _new_state(params, optimizer):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def init_state(model, optimizer, mesh, seed: int) -> TrainState:
    """Step 0, each array made where it rests; the same numbers on any mesh."""
    shardings = state_sharding_tree(model, optimizer, mesh)
    make = jax.jit(
        lambda seed: _new_state(model.init(jax.random.key(seed)), optimizer),
        out_shardings=shardings,
    )
    return make(seed)


def abstract_batch(batch: int, seq_len: int, mesh, docs: bool) -> dict:
    """What `data.build_batches` yields, as ShapeDtypeStructs."""
    tokens = jax.ShapeDtypeStruct((batch, seq_len + 1), jnp.int32, sharding=batch_sharding(mesh))
    return {"tokens": tokens} | ({"docs": tokens} if docs else {})


def target_weights(batch):
    """[B,T]: 1 where the target is a token, 0 where it is padding; float64 if that is enabled."""
    if "docs" not in batch:
        return jnp.ones(batch["tokens"][:, 1:].shape, float)
    return (batch["docs"][:, 1:] >= 0).astype(float)


def batch_loss(model, loss, params, batch, weights_BT):
    """(objective, nats) of one microbatch: weighted sums over its targets."""
    docs_BT = batch["docs"][:, :-1] if "docs" in batch else None
    h_BTD = model.apply(params, batch["tokens"][:, :-1], docs_BT)
    return loss(h_BTD, head_weights(params), batch["tokens"][:, 1:], weights_BT)


def microbatches(x, count):
    """[B,...] -> [count,B/count,...], each holding rows of every device."""
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


def build_gradient(model, loss, accumulation, shardings=None):
    """gradient(params, batch) -> (nats, objective, grads), means over the batch's targets."""

    def gradient(params, batch):
        weights = target_weights(batch)
        weights = weights / jnp.maximum(weights.sum(), 1)

        def one(batch, weights):
            run = lambda params: batch_loss(model, loss, params, batch, weights)
            (objective, nats), grads = jax.value_and_grad(run, has_aux=True)(params)
            if shardings is not None:
                grads = jax.lax.with_sharding_constraint(grads, shardings)
            return nats, objective, grads

        if accumulation == 1:
            return one(batch, weights)
        split = lambda x: microbatches(x, accumulation)
        parts = jax.tree.map(split, batch), split(weights)
        # Hidden, or XLA takes these zeros for those of the optimizer's skipped step and keeps a
        # second tree of them through the loop: 3.5 of 30.6 GiB at 1.4B (A40, jax 0.10.2).
        zero = jax.lax.optimization_barrier(jnp.zeros((), jax.tree.leaves(params)[0].dtype))
        carry = (zero, zero, jax.tree.map(lambda w: jnp.broadcast_to(zero, w.shape), params))
        add = lambda carry, part: (jax.tree.map(jnp.add, carry, one(*part)), None)
        return jax.lax.scan(add, carry, parts)[0]

    return gradient


def abstract_rates(rates: dict, mesh) -> dict:
    """What place_rates gives, as ShapeDtypeStructs."""
    scalar = jax.ShapeDtypeStruct((), jnp.result_type(float), sharding=replicated(mesh))
    return dict.fromkeys(rates, scalar)


def place_rates(rates: dict, mesh) -> dict:
    """Peak rates as arrays: arguments of the step, so that another rate is no other program."""
    dtype = jnp.result_type(float)
    return jax.device_put({n: np.asarray(r, dtype) for n, r in rates.items()}, replicated(mesh))


def build_advance(model, loss, optimizer, rate, shardings=None, accumulation=1):
    """advance(state, batch, rates) -> (state, scalars, grads): the step, not yet compiled.

    `rates` is from `place_rates(peak_rates(...))`.

    Args:
        rate: updates applied so far -> share of the peak learning rate, a report only.
        shardings: of the gradients; None is as they come.
    """
    gradient = build_gradient(model, loss, accumulation, shardings)

    def advance(state, batch, rates):
        nats, objective, grads = gradient(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(objective) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, good=good, rates=rates
        )
        params = optax.apply_updates(state.params, updates)
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        skipped = state.skipped_steps + ~good
        new = TrainState(state.step + 1, params, opt_state, bad_steps, skipped)
        scalars = {
            "train/loss_nats": nats,
            "train/grad_norm": grad_norm,
            "train/bad_steps": bad_steps,
            "train/skipped_steps": skipped,
            "optim/rate": rate(state.step - state.skipped_steps),
        } | update_rms_by_group(updates, model.axes)
        return new, scalars, grads

    return advance


def build_step(model, loss, optimizer, rate, mesh, accumulation=1):
    """step(state, batch, rates) -> (state, scalars): build_advance's, jitted, the state donated."""
    shardings = state_sharding_tree(model, optimizer, mesh)
    spread = shardings.params if mesh.size > 1 else None
    advance = build_advance(model, loss, optimizer, rate, spread, accumulation)
    step = lambda state, batch, rates: advance(state, batch, rates)[:2]
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))

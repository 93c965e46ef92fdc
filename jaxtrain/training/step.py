"""One training step: gradients summed over microbatches, one optimizer update, compiled once.

A step whose loss or gradient is not finite is skipped: it changes neither parameters nor optimizer
state, and is counted. Nothing in here waits for the device.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain.config.sections import OptimConfig
from jaxtrain.distributed.mesh import param_sharding, platform, replicated
from jaxtrain.model.transformer import Model, head_weights
from jaxtrain.optim.build import apply_and_measure, state_shardings
from jaxtrain.optim.schedule import build_schedule
from jaxtrain.training.batch_arrays import microbatches, source_groups, target_weights

# XLA's CPU scheduler otherwise spends memory on parallelism that the thread pool cannot use:
# 11.7 GB of temporaries against 7.2 at 1.4B parameters with Muon, the same step time at 3.5M.
CPU_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_copy_insertion_use_region_analysis": True,
}

BY_SOURCE = "train/by_source"  # see build_step


class TrainState(NamedTuple):
    """Everything that a step reads and replaces. Also used as a tree of shapes or shardings."""

    step: Any  # int32 [], batches consumed
    params: Any  # float32 masters, nested dict
    opt_state: Any
    bad_steps: Any  # int32 [], steps skipped in a row
    skipped_steps: Any  # int32 [], steps skipped in total


class Recompiled(ValueError):
    """The step was called with arguments other than those it was compiled for."""


class Step:
    """A jitted function compiled ahead of time; arguments of other types are an error.

    Calling a jitted function with a new shape or dtype would silently compile it again.

    Args:
        function: the result of jax.jit.
        abstract: ShapeDtypeStructs, with shardings, of its arguments.
        options: for XLA, on a GPU.

    Attributes:
        compiled: JAX's compiled executable.
        compile_s: seconds that lowering and compiling took.
    """

    def __init__(self, function, *abstract, options: dict[str, Any] | None = None):
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
            changed = _describe_changes(self._abstract, args)
            if not changed:
                raise
            raise Recompiled(
                f"a step must get the arguments that it was compiled for; got other ones: "
                f"{'; '.join(changed[:4])}."
            ) from error


def _describe_changes(abstract, args) -> list[str]:
    """Returns `path: expected -> actual` for each leaf that is absent or has another type."""

    def types_by_path(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}

    expected, actual = types_by_path(abstract), types_by_path(args)
    return [
        f"{path}: {expected.get(path, 'absent')} -> {actual.get(path, 'absent')}"
        for path in sorted(expected.keys() | actual.keys())
        if expected.get(path) != actual.get(path)
    ]


def state_sharding_tree(model: Model, optimizer, mesh: Mesh) -> TrainState:
    """Returns the sharding of each leaf of a TrainState.

    Optimizer moments may be split further than their parameters.
    """
    params = jax.tree.map(lambda a, s: param_sharding(a, s.shape, mesh), model.axes, model.shapes)
    scalar = replicated(mesh)
    opt_state = state_shardings(optimizer, model.axes, model.shapes, mesh)
    return TrainState(scalar, params, opt_state, scalar, scalar)


def abstract_state(model: Model, optimizer, mesh: Mesh) -> TrainState:
    """Returns the TrainState as ShapeDtypeStructs with shardings, to compile and restore with."""
    state = jax.eval_shape(lambda: _new_state(model.init(jax.random.key(0)), optimizer))
    shardings = state_sharding_tree(model, optimizer, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def _new_state(params, optimizer) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def init_state(model: Model, optimizer, mesh: Mesh, start: Any) -> TrainState:
    """Returns the state at step 0; the numbers are the same on any mesh.

    out_shardings make every device compute only its own part of each array.

    Args:
        start: seed of random parameters, or the parameters, a dict, which are donated.
    """
    random = not isinstance(start, dict)

    def new_state(start):
        params = model.init(jax.random.key(start)) if random else start
        return _new_state(params, optimizer)

    shardings = state_sharding_tree(model, optimizer, mesh)
    init = jax.jit(new_state, out_shardings=shardings, donate_argnums=() if random else 0)
    return init(start)


def abstract_rates(rates: dict[str, float], mesh: Mesh) -> dict:
    """Returns what place_rates returns, as ShapeDtypeStructs."""
    scalar = jax.ShapeDtypeStruct((), jnp.result_type(float), sharding=replicated(mesh))
    return dict.fromkeys(rates, scalar)


def place_rates(rates: dict[str, float], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns peak learning rates as arrays on the mesh.

    They are arguments of the step and not constants in it: a study of learning rates then compiles
    one program.
    """
    dtype = jnp.result_type(float)
    return jax.device_put({n: np.asarray(r, dtype) for n, r in rates.items()}, replicated(mesh))


def batch_loss(
    model: Model, loss: Callable, params, batch: dict, weights_BT, sources: int = 0
) -> tuple:
    """Returns (objective, nats) of a microbatch: weighted sums over its targets.

    Args:
        sources: S of a mixture, which makes nats a pair: that of all targets [], and those of each
            source [S].
    """
    docs_BT = batch["docs"][:, :-1] if "docs" in batch else None
    h_BTD = model.apply(params, batch["tokens"][:, :-1], docs_BT)
    targets_BT, bias_V = batch["tokens"][:, 1:], params.get("head_bias")
    groups = (source_groups(batch, sources, weights_BT.dtype),) if sources else ()
    return loss(h_BTD, head_weights(params), targets_BT, weights_BT, bias_V, *groups)


def build_gradient(
    model: Model, loss: Callable, accumulation: int, shardings=None, sources: int = 0
) -> Callable:
    """Returns gradient(params, batch) -> (nats, objective, grads), means over the batch's targets.

    Args:
        accumulation: microbatches, one after another, to fit in memory.
        shardings: of the gradients, like params; None leaves them to XLA.
        sources: as in batch_loss. The parts of nats add up to the mean over all targets.
    """

    def gradient(params, batch):
        # Weights are normalised over the whole batch before it is split, so that the sum over
        # microbatches is the mean over the batch however the padding is distributed.
        weights = target_weights(batch)
        weights = weights / jnp.maximum(weights.sum(), 1)

        def microbatch_gradient(batch, weights):
            objective_of = lambda params: batch_loss(model, loss, params, batch, weights, sources)
            (objective, nats), grads = jax.value_and_grad(objective_of, has_aux=True)(params)
            if shardings is not None:
                # Reduce-scatters each gradient to the parameter's own split. Without it the
                # partitioner may all-reduce, and every device holds whole gradients.
                grads = jax.lax.with_sharding_constraint(grads, shardings)
            return nats, objective, grads

        if accumulation == 1:
            return microbatch_gradient(batch, weights)
        split = lambda x: microbatches(x, accumulation)
        parts = jax.tree.map(split, batch), split(weights)
        # The barrier hides that these are zeros: XLA otherwise shares them with the zeros of the
        # optimizer's skipped step and keeps a second tree of them through the loop, 3.5 of
        # 30.6 GiB at 1.4B parameters (A40, jax 0.10.2).
        zero = jax.lax.optimization_barrier(jnp.zeros((), jax.tree.leaves(params)[0].dtype))
        nats = (zero, jnp.broadcast_to(zero, sources)) if sources else zero
        sums = (nats, zero, jax.tree.map(lambda w: jnp.broadcast_to(zero, w.shape), params))
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, microbatch_gradient(*part)), None)
        return jax.lax.scan(add, sums, parts)[0]

    return gradient


def build_update(model: Model, optimizer, cfg: OptimConfig) -> Callable:
    """Returns update(state, (nats, objective, grads), rates) -> (state, scalars).

    Args:
        cfg: the optimizer's; its schedule and groups name what is reported.
    """
    rate = build_schedule(cfg)

    def update(state, gradient, rates):
        nats, objective, grads = gradient
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(objective) & jnp.isfinite(grad_norm)
        # With good=False the optimizer returns zero updates and its old state, selected on the
        # device: the host need not look at the loss before the next step starts.
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, good=good, rates=rates
        )
        params, update_rms = apply_and_measure(state.params, updates, model.axes, cfg)
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        skipped = state.skipped_steps + ~good
        new = TrainState(state.step + 1, params, opt_state, bad_steps, skipped)
        scalars = {
            "train/loss_nats": nats,
            "train/grad_norm": grad_norm,
            "train/bad_steps": bad_steps,
            "train/skipped_steps": skipped,
            "optim/rate": rate(state.step - state.skipped_steps),
        } | update_rms
        return new, scalars

    return update


def build_step(
    model: Model,
    loss: Callable,
    optimizer,
    cfg: OptimConfig,
    mesh: Mesh,
    accumulation: int = 1,
    sources: int = 0,
) -> Callable:
    """Returns step(state, batch, rates) -> (state, scalars), jitted.

    The state is donated: XLA writes the new state into the old one's buffers, so that the device
    stores it once. XLA reuses a buffer only for an output of the same shape and sharding, hence
    out_shardings.

    Args:
        sources: of a mixture; the scalars then have BY_SOURCE, float32 [2,S]: each source's part of
            the loss, and its share of the targets. Their ratio is the source's mean loss.
    """
    shardings = state_sharding_tree(model, optimizer, mesh)
    grad_shardings = shardings.params if mesh.size > 1 else None
    gradient = build_gradient(model, loss, accumulation, grad_shardings, sources)
    update = build_update(model, optimizer, cfg)

    def step(state, batch, rates):
        nats, objective, grads = gradient(state.params, batch)
        nats, *by_source = jax.tree.leaves(nats)
        state, scalars = update(state, (nats, objective, grads), rates)
        if sources:
            weights_BT = target_weights(batch)
            groups_BS = source_groups(batch, sources, weights_BT.dtype)
            shares = (weights_BT.sum(1)[:, None] * groups_BS).sum(0)
            scalars[BY_SOURCE] = jnp.stack([*by_source, shares / jnp.maximum(shares.sum(), 1)])
        return state, scalars

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))

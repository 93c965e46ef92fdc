"""Builds a config's optimizer: noise, clipping, and each group's direction, rate and decay."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config.sections import OptimConfig
from jaxtrain.distributed.mesh import moment_spec, platform
from jaxtrain.model.trees import ArrayTree, AxesTree
from jaxtrain.ops.routes import Route
from jaxtrain.optim import select_option
from jaxtrain.optim.acceleration import ema_lookahead, gradient_transport
from jaxtrain.optim.adam import scale_by_adam
from jaxtrain.optim.clipping import clip_gradients
from jaxtrain.optim.collectives import build_replica_gather
from jaxtrain.optim.default_axes import check_floating
from jaxtrain.optim.describe import report_groups
from jaxtrain.optim.lmo import buffer_dtype, scale_by_lmo
from jaxtrain.optim.muon import build_muon, has_whole_steps
from jaxtrain.optim.muown import build_muown
from jaxtrain.optim.noise import heavy_tailed_noise
from jaxtrain.optim.normuon import balance_neurons
from jaxtrain.optim.owners import ownership
from jaxtrain.optim.param_groups import (
    MATRICES,
    check_axes,
    check_axes_fit,
    group_of,
    group_table,
    select_group,
)
from jaxtrain.optim.parametrisation import scale_by_size
from jaxtrain.optim.rate_step import build_rate_step
from jaxtrain.optim.schedule import build_schedule
from jaxtrain.optim.soap import build_soap
from jaxtrain.optim.soap_muon import build_soap_muon
from jaxtrain.optim.tail_average import tail_average

SLICE_BYTES, MOST_SLICES = 2**20, 16  # of a parameter, for the RMS of updates on a CPU
LOOKAHEAD_WINDOW = 0.15, 0.77  # start and stop as shares of the run; from ema_lookahead's source


def _muon(cfg, axes, mesh, square):
    return build_muon(cfg, axes, mesh, square, cfg.nesterov)


def _normuon(cfg, axes, mesh, square):
    balance = balance_neurons(axes, cfg.neuron_decay, mesh)
    return optax.chain(_muon(cfg, axes, mesh, square), balance)


def _adamw(cfg, *_):
    return scale_by_adam(cfg.adam_b1, cfg.adam_b2, cfg.adam_eps)


# optim.name -> build(OptimConfig, axes, mesh, square's Route) of the matrices' direction
OPTIMIZERS = {
    "muon": _muon,
    "normuon": _normuon,
    "soap": build_soap,
    "soap_muon": build_soap_muon,
    "accelerated_lmo": _muon,
    "muon_h": _muon,
    "adam_h": _adamw,
    "muown": _muon,
    "adamw": _adamw,
}


def _transport(cfg, inner, momentum):
    return gradient_transport(inner, momentum, cfg.strength, buffer_dtype(cfg))


def _lookahead(cfg, inner, momentum):
    del momentum
    if not cfg.strength:
        return ema_lookahead(inner, 0.0, cfg.lookahead_decay)
    schedule = build_schedule(cfg)
    start, stop = (round(share * cfg.total_steps) for share in LOOKAHEAD_WINDOW)

    def strength(count):  # zero during warm-up and decay
        return jnp.where((count >= start) & (count < stop), cfg.strength * schedule(count), 0.0)

    return ema_lookahead(inner, strength, cfg.lookahead_decay, buffer_dtype(cfg))


# optim.acceleration -> wrap(OptimConfig, a complete optimizer, its momentum)
ACCELERATIONS = {"transport": _transport, "ema_lookahead": _lookahead}


def _accelerate(cfg, name, geometry, optimizer):
    accelerate = select_option(ACCELERATIONS, cfg.acceleration, "optim.acceleration")
    is_soap = name == MATRICES and cfg.name == "soap"  # its steps have no norm, but its momentum
    return accelerate(cfg, optimizer, cfg.momentum if geometry or is_soap else cfg.adam_b1)


def build_optimizer(
    cfg: OptimConfig,
    axes: AxesTree,
    mesh: Mesh | None = None,
    seed: int = 0,
    square: Route | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of an OptimConfig; its `update` needs params.

    `update(..., good=False)` is for non-finite gradients: it returns updates of zero and leaves the
    state unchanged. `update(..., rates=peak_rates(cfg, axes))` takes the peak rates as arrays, so
    that one compiled step serves every rate; by default they are constants of the program.

    Args:
        axes: pytree of Axes, like params.
        mesh: mesh over which params are split; None means one device.
        seed: seed of the injected noise.
        square: route of Newton-Schulz' symmetric products; None means XLA.

    Raises:
        ValueError: a leaf of axes is not an Axes, an optimizer or schedule is unknown, or (at
            init) axes do not name the parameters or do not fit their shapes, or a parameter has no
            real floating type.
    """
    check_axes(axes)
    build_direction = select_option(OPTIMIZERS, cfg.name, "optim.name")
    groups = jax.tree.map(lambda a: group_of(cfg, a), axes)
    names = jax.tree.map(lambda group: group.name, groups)
    schedule, optimizers = build_schedule(cfg), {}
    for name, geometry in sorted({(g.name, g.geometry) for g in jax.tree.leaves(groups)}):
        select = functools.partial(select_group, names, name)
        accelerated = cfg.accelerates and (name == MATRICES or cfg.accelerate_all)
        # Transport already moves the query point along the momentum, as Nesterov's momentum would.
        nesterov = cfg.nesterov and not (accelerated and cfg.acceleration == "transport")
        if name == MATRICES:
            own = dataclasses.replace(cfg, nesterov=nesterov)
            direction = build_direction(own, select(axes), mesh, square)
        elif geometry:
            options = {"scale": "none", "dtype": jnp.float32, "buffer_dtype": buffer_dtype(cfg)}
            direction = scale_by_lmo(select(axes), geometry, cfg.momentum, nesterov, **options)
        else:
            direction = _adamw(cfg)
        direction = scale_by_size(cfg, axes, direction, is_adam=not geometry)
        parts = select(groups), select(axes), schedule
        if name == MATRICES and cfg.name == "muown":
            optimizer = build_muown(cfg, direction, *parts)
        else:
            optimizer = optax.chain(direction, build_rate_step(cfg, *parts))
        optimizers[name] = _accelerate(cfg, name, geometry, optimizer) if accelerated else optimizer
    transform = optax.chain(
        heavy_tailed_noise(cfg.noise_tail, cfg.noise_scale, seed),
        clip_gradients(cfg.clip_norm, cfg.clip_eps),
        optax.partition(optimizers, names),
    )
    if cfg.tail_average:
        start = round((1 - cfg.tail_average) * cfg.total_steps)
        transform = tail_average(transform, max(start, 1), cfg.tail_horizon, cfg.tail_weight)

    def init(params):
        check_floating(params)
        check_axes_fit(axes, params)
        report_groups(lambda: group_table(cfg, axes, params))
        return transform.init(params)

    def update(updates, state, params=None, **extra):
        updates, state = transform.update(updates, state, params, **extra)
        return updates if has_whole_steps(cfg) else gather(axes, updates), state

    gather = build_replica_gather(mesh)
    return optax.GradientTransformationExtraArgs(init, update)


def peak_rates(cfg: OptimConfig, axes: AxesTree) -> dict[str, float]:
    """Returns {group's name: peak rate}, for `update(..., rates=)`.

    With optim.parametrisation=spectral a parameter's rate is its group's times its step factor.
    """
    groups = (group_of(cfg, a) for a in jax.tree.leaves(axes))
    return {group.name: float(group.rate) for group in groups}


def state_shardings(
    optimizer: optax.GradientTransformation, axes: AxesTree, params: ArrayTree, mesh: Mesh
) -> Any:
    """Returns the shardings of optimizer.init(params): moments are sharded by `moment_spec`.

    A leaf of the state belongs to a parameter if its path ends in the parameter's path and both
    have the same shape, so that wrappers need no code here. All leaves of a parameter in a field
    named `owned` are with the parameter's `ownership`. Other leaves (counts) are replicated.

    Args:
        axes: pytree of Axes, like params.
        params: pytree of arrays or ShapeDtypeStructs.
    """
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    axes_of = dict(jax.tree_util.tree_leaves_with_path(axes))

    def sharding(path, leaf):
        owned = any(getattr(key, "name", None) == "owned" for key in path)
        suffixes = (path[i:] for i in range(len(path)) if path[i:] in shapes)
        param = next((s for s in suffixes if owned or shapes[s] == leaf.shape), None)
        if param is None:
            return NamedSharding(mesh, P())
        owner = axes_of[param], shapes[param], mesh
        return NamedSharding(mesh, ownership(*owner).owned if owned else moment_spec(*owner))

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, params))


def apply_and_measure(
    params: ArrayTree, updates: ArrayTree, axes: AxesTree, cfg: OptimConfig
) -> tuple[ArrayTree, dict[str, jax.Array]]:
    """Returns the new parameters and the RMS of each group's updates.

    The latter is `{"optim/matrices/update_rms": float32 [], ...}`.
    """
    leaves, treedef = jax.tree.flatten(params)
    squares, sizes, new = {}, {}, []
    for a, p, u in zip(jax.tree.leaves(axes), leaves, jax.tree.leaves(updates), strict=True):
        name = group_of(cfg, a).name
        p, square = _add_and_square(p, u)
        new.append(p)
        squares[name] = squares.get(name, 0.0) + square
        sizes[name] = sizes.get(name, 0) + u.size
    rms = {f"optim/{name}/update_rms": jnp.sqrt(squares[name] / sizes[name]) for name in sizes}
    return treedef.unflatten(new), rms


def _add_and_square(p, u):
    """Returns (p + u, the sum of u's squares)."""
    square = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)))
    if platform() != "cpu" or not u.ndim:
        return (p + u).astype(p.dtype), square(u)
    # XLA's CPU backend stores what it sums, and would sum the squares of all updates before it
    # overwrites the first parameter: 4.2 times the largest stack at 124M (jax 0.10.2). So it sums
    # slices, and two operations without effect order the sum, the new parameter and the next sum.
    count = min(max(u.nbytes // SLICE_BYTES, 1), MOST_SLICES, len(u))
    total = sum(map(square, jnp.array_split(u, count)))
    p = (p + jnp.where(total < 0, 0, u)).astype(p.dtype)
    return p, total + 0 * p[(0,) * p.ndim].astype(jnp.float32)

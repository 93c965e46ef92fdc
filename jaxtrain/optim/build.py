"""build_optimizer: noise and clip, then each group's direction, rate, decay and acceleration."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.mesh import moment_spec
from jaxtrain.ops import fused
from jaxtrain.optim import pick
from jaxtrain.optim.acceleration import ema_lookahead, transported
from jaxtrain.optim.adam import scale_by_adam
from jaxtrain.optim.lmo import scale_by_lmo
from jaxtrain.optim.noise import heavy_tailed_noise
from jaxtrain.optim.normuon import balance_neurons
from jaxtrain.optim.param_groups import MATRICES, REST, check_axes, check_same_names, group_of
from jaxtrain.optim.schedule import build_schedule
from jaxtrain.optim.sharded_muon import on_owners

LOOKAHEAD_WINDOW = 0.15, 0.77  # of the run; source: as ema_lookahead's


def _buffer_dtype(cfg):
    return jnp.bfloat16 if cfg.narrow_buffers else None


class _Place(NamedTuple):
    """Where an optimizer steps, and by which route its square products are made."""

    mesh: jax.sharding.Mesh | None
    square: Any = None  # a Route


def _lmo(cfg, axes, place, nesterov):
    spectral, mesh = {}, place.mesh
    if cfg.geometry == "spectral":
        spectral = {"steps": cfg.ns_steps or None, "coefficients": cfg.ns_coefficients}
        if mesh is not None and mesh.size > 1:
            spectral["over"] = on_owners(mesh, copied=cfg.name != "accelerated_lmo")
        if place.square is not None and place.square.tiles:
            spectral["square"] = fused.build_square(place.square)
    return scale_by_lmo(
        axes,
        geometry=cfg.geometry,
        momentum=cfg.momentum,
        nesterov=nesterov,
        scale=cfg.scale,
        dtype=jnp.dtype(cfg.ns_dtype),
        buffer_dtype=_buffer_dtype(cfg),
        per_head=cfg.per_head,
        **spectral,
    )


def _muon(cfg, axes, place):
    return _lmo(cfg, axes, place, cfg.nesterov)


def _normuon(cfg, axes, place):
    return optax.chain(_muon(cfg, axes, place), balance_neurons(axes, cfg.neuron_decay))


def _accelerated_lmo(cfg, axes, place):  # the wrapper takes the place of Nesterov's mixing
    return _lmo(cfg, axes, place, nesterov=cfg.acceleration == "ema_lookahead" and cfg.nesterov)


def _adamw(cfg, axes=None, place=None):
    del axes, place
    return scale_by_adam(cfg.adam_b1, cfg.adam_b2, cfg.adam_eps)


# optim.name -> direction of the matrices: (OptimConfig, axes, _Place) -> GradientTransformation
OPTIMIZERS = {
    "muon": _muon,
    "normuon": _normuon,
    "accelerated_lmo": _accelerated_lmo,
    "adamw": _adamw,
}


def _transport(cfg, inner, momentum):
    return transported(inner, momentum, cfg.strength, _buffer_dtype(cfg))


def _lookahead(cfg, inner, momentum):
    del momentum
    schedule, total = build_schedule(cfg), cfg.total_steps
    start, stop = (round(share * total) for share in LOOKAHEAD_WINDOW)

    def strength(count):  # off where the rate is not at its height
        return jnp.where((count >= start) & (count < stop), cfg.strength * schedule(count), 0.0)

    return ema_lookahead(inner, strength, cfg.lookahead_decay, _buffer_dtype(cfg))


# (OptimConfig, whole optimizer, its momentum) -> the same, accelerated
ACCELERATIONS = {"transport": _transport, "ema_lookahead": _lookahead}


class RateState(NamedTuple):
    count: jax.Array  # int32 [], updates made: what every group's rate follows


def _scale_by_rate(groups, schedule) -> optax.GradientTransformationExtraArgs:
    """u -> -rate * schedule(count) * (u + decay * p), each leaf with its group's rate and decay.

    `update(..., rates={group's name: peak})` takes the rates at run time instead.
    """

    def init(params):
        del params
        return RateState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, good=True, rates=None, **extra):
        del extra
        scale = schedule(state.count)

        def step(group, u, p):
            decayed = u + group.decay * p if group.decay else u
            rate = group.rate if rates is None else rates[group.name]
            return jnp.where(good, (-rate * scale).astype(u.dtype) * decayed, 0)

        updates = jax.tree.map(step, groups, updates, params)
        return updates, RateState(state.count + jnp.where(good, 1, 0))

    return optax.GradientTransformationExtraArgs(init, update)


def _direction(cfg, name, geometry, axes, place):
    """The unscaled step of one group."""
    if name == MATRICES:
        return pick(OPTIMIZERS, cfg.name, "optim.name")(cfg, axes, place)
    if not geometry:
        return _adamw(cfg)
    options = {"scale": "none", "buffer_dtype": _buffer_dtype(cfg), "dtype": jnp.float32}
    return scale_by_lmo(axes, geometry, cfg.momentum, cfg.nesterov, **options)


def build_optimizer(
    cfg, axes, mesh=None, seed=0, square=None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of an OptimConfig; `update` needs params.

    `update(..., good=False)` gives updates of zero and the state as it was, whatever the gradients
    hold: a step that is not finite. `update(..., rates=peak_rates(cfg, axes))` takes the peak rates
    as arrays, so that one compiled step serves every rate; without it they are the program's.

    Args:
        axes: pytree of Axes, like params.
        mesh: where params are split; None is one device.
        seed: of injected noise.
        square: the route of Newton-Schulz' symmetric products; None is XLA's.

    Raises:
        ValueError: a leaf of axes is not an Axes, an optimizer or schedule is unknown, or (at
            init) axes and params do not name the same parameters.
    """
    check_axes(axes)
    pick(OPTIMIZERS, cfg.name, "optim.name")
    groups = jax.tree.map(lambda a: group_of(cfg, a), axes)
    names = jax.tree.map(lambda group: group.name, groups)
    schedule, optimizers = build_schedule(cfg), {}
    for name, geometry in sorted({(g.name, g.geometry) for g in jax.tree.leaves(groups)}):
        only = lambda tree, name=name: jax.tree.map(
            lambda n, x: x if n == name else optax.MaskedNode(), names, tree
        )
        direction = _direction(cfg, name, geometry, only(axes), _Place(mesh, square))
        whole = optax.chain(direction, _scale_by_rate(only(groups), schedule))
        if cfg.name == "accelerated_lmo" and (name == MATRICES or cfg.accelerate_all):
            accelerate = pick(ACCELERATIONS, cfg.acceleration, "optim.acceleration")
            whole = accelerate(cfg, whole, cfg.momentum if geometry else cfg.adam_b1)
        optimizers[name] = whole
    transform = optax.chain(
        heavy_tailed_noise(cfg.noise_tail, cfg.noise_scale, seed),
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.partition(optimizers, names),
    )

    def init(params):
        check_same_names(axes, params)
        return transform.init(params)

    return optax.GradientTransformationExtraArgs(init, transform.update)


def peak_rates(cfg, axes) -> dict[str, float]:
    """{group's name: peak rate} of an OptimConfig, for `update(..., rates=)`."""
    groups = (group_of(cfg, a) for a in jax.tree.leaves(axes))
    return {group.name: group.rate for group in groups}


def state_shardings(optimizer, axes, params, mesh):
    """Shardings of optimizer.init(params): moments rest where `mesh.moment_spec` says.

    A leaf of the state belongs to the parameter whose path ends its own path and whose shape it
    has, so wrappers around the optimizer need nothing here. All else (counts) is copied.

    Args:
        axes: pytree of Axes, like params.
        params: pytree of arrays or ShapeDtypeStructs.
    """
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    described = dict(jax.tree_util.tree_leaves_with_path(axes))

    def find(path, leaf):
        ends = (path[i:] for i in range(len(path)))
        owner = next((end for end in ends if shapes.get(end) == leaf.shape), None)
        spec = P() if owner is None else moment_spec(described[owner], leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(find, jax.eval_shape(optimizer.init, params))


def update_rms_by_group(updates, axes) -> dict:
    """`{"optim/matrices/update_rms": float32 [], ...}` of the groups that have parameters."""
    squares, sizes = {}, {}
    for a, u in zip(jax.tree.leaves(axes), jax.tree.leaves(updates), strict=True):
        name = MATRICES if a.is_matrix else REST
        squares[name] = squares.get(name, 0.0) + jnp.sum(jnp.square(u.astype(jnp.float32)))
        sizes[name] = sizes.get(name, 0) + u.size
    return {f"optim/{name}/update_rms": jnp.sqrt(squares[name] / sizes[name]) for name in sizes}

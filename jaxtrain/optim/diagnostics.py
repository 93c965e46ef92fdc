"""Optimizer diagnostics by parameter group: sizes, spectra, gradient noise and its tail.

Every metric is named optim/GROUP/NAME. Spectra are computed for two matrices of each parameter, and
the tail for a few thousand coordinates, so that a diagnosis costs about as much as one step.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.axes import Axes
from jaxtrain.config.sections import OptimConfig
from jaxtrain.model.trees import ArrayTree, AxesTree, named_leaves
from jaxtrain.optim.lmo import build_unit_step, map_in_place
from jaxtrain.optim.newton_schulz import NewtonSchulz
from jaxtrain.optim.param_groups import group_of
from jaxtrain.optim.sharded_muon import build_sharded_map

Metrics = dict[str, jax.Array]  # float32 [] each

MOMENTS = ("momentum", "mean")  # fields of optimizer states that store an averaged gradient
COORDINATES = 8_192  # most coordinates to sample from one parameter
TAIL = 0.01  # the tail index is computed from the largest differences: this share of all
EXACT = NewtonSchulz("polar_express", steps=8)  # singular values end within 1e-3 of 1


def _by_group(cfg, axes, *trees) -> dict[str, list[tuple]]:
    """Returns {group's name: [(Axes, leaf of each tree)]}."""
    groups = {}
    leaves = [jax.tree.leaves(tree) for tree in (axes, *trees)]
    for a, *rest in zip(*leaves, strict=True):
        groups.setdefault(group_of(cfg, a).name, []).append((a, *rest))
    return groups


def _sum_of_squares(xs) -> jax.Array:
    return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in xs), jnp.float32(0))


def squared_norms(cfg: OptimConfig, axes: AxesTree, tree: ArrayTree) -> Metrics:
    """Returns {group: squared norm} of a tree."""
    groups = _by_group(cfg, axes, tree).items()
    return {name: _sum_of_squares(x for _, x in leaves) for name, leaves in groups}


def weight_and_update_sizes(
    cfg: OptimConfig, axes: AxesTree, params: ArrayTree, grads: ArrayTree, updates: ArrayTree
) -> Metrics:
    """Computes root mean squares of weights and updates, and the cosine of -update and gradient.

    The cosine is 1 for steepest descent and 0 for a step that has forgotten this gradient.
    """
    metrics = {}
    for name, leaves in _by_group(cfg, axes, params, grads, updates).items():
        _, p, g, u = zip(*leaves, strict=True)
        size = sum(x.size for x in p)
        dot = sum(
            jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32))
            for a, b in zip(g, u, strict=True)
        )
        lengths = jnp.sqrt(_sum_of_squares(g)) * jnp.sqrt(_sum_of_squares(u))
        metrics[f"optim/{name}/weight_rms"] = jnp.sqrt(_sum_of_squares(p) / size)
        metrics[f"optim/{name}/update_rms"] = jnp.sqrt(_sum_of_squares(u) / size)
        metrics[f"optim/{name}/gradient_rms"] = jnp.sqrt(_sum_of_squares(g) / size)
        tiny = jnp.finfo(jnp.float32).tiny
        metrics[f"optim/{name}/step_gradient_cosine"] = -dot / jnp.maximum(lengths, tiny)
    return metrics


def dual_norms(
    cfg: OptimConfig, axes: AxesTree, grads: ArrayTree, mesh: Mesh | None = None
) -> Metrics:
    """Sums <g, unit step of g> over each group whose steps are unit steps of a norm.

    It is the gradient's dual norm: for spectral steps the sum of singular values, within 0.1 %.
    """
    members: dict[tuple[str, str], dict[str, Axes]] = {}  # by (group's name, geometry)
    for key, a in named_leaves(axes).items():
        group = group_of(cfg, a)
        if group.geometry:
            members.setdefault((group.name, group.geometry), {})[key] = a
    named_grads, metrics = named_leaves(grads), {}
    for (name, geometry), group_axes in members.items():
        spectral = geometry == "spectral"
        sharded_mesh = mesh if spectral and mesh is not None and mesh.size > 1 else None
        step = build_unit_step(
            EXACT if spectral else geometry,
            scale="none",
            dtype=jnp.float32,
            per_head=cfg.per_head and all(a.is_matrix for a in group_axes.values()),
            map_matrices=build_sharded_map(sharded_mesh) if sharded_mesh else map_in_place,
        )
        g = {key: named_grads[key].astype(jnp.float32) for key in group_axes}
        units = step(group_axes, g)
        metrics[f"optim/{name}/gradient_dual_norm"] = sum(jnp.vdot(g[k], units[k]) for k in g)
    return metrics


def averaged_gradients(opt_state: Any, params: ArrayTree) -> dict[tuple, jax.Array]:
    """Returns {path: averaged gradient} of the parameters, wherever the state has them."""
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    averages = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        for i, key in enumerate(path):
            if getattr(key, "name", None) in MOMENTS and shapes.get(path[i + 1 :]) == leaf.shape:
                averages[path[i + 1 :]] = leaf
    return averages


def _gram(axes, x, per_head):
    """Returns Gram matrices [2,M,M] of the first and last matrix in x's stack.

    Each matrix is scaled to a largest entry of 1, so that squares stay in range.
    """
    axes, x = axes.split_heads(x) if per_head else (axes, x)
    x_XIO = axes.to_matrices(x)[jnp.array([0, -1])].astype(jnp.float32)
    largest = jnp.max(jnp.abs(x_XIO), (-2, -1), keepdims=True)
    x_XIO /= jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)
    equation = "xmn,xkn->xmk" if x_XIO.shape[-2] <= x_XIO.shape[-1] else "xnm,xnk->xmk"
    return jnp.einsum(equation, x_XIO, x_XIO, precision="highest")


def spectrum(gram_XMM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes stable rank and condition number [X] of matrices from their Gram matrices.

    The stable rank is |M|_F^2 / |M|_2^2. The condition number saturates at 2,896: smaller singular
    values are lost, as the Gram matrix has their squares in float32.
    """
    values_XM = jnp.linalg.eigvalsh(gram_XMM)
    largest_X = jnp.maximum(values_XM[:, -1], jnp.finfo(jnp.float32).tiny)
    floor_X = largest_X * jnp.finfo(jnp.float32).eps
    condition_X = jnp.sqrt(largest_X / jnp.maximum(values_XM[:, 0], floor_X))
    return jnp.trace(gram_XMM, axis1=1, axis2=2) / largest_X, condition_X


def orthogonality_error(gram_XMM: jax.Array) -> jax.Array:
    """Computes sqrt(mean((s^2 / mean(s^2) - 1)^2)) [X] of singular values s; 0 if all are equal."""
    M = gram_XMM.shape[-1]
    trace_X = jnp.trace(gram_XMM, axis1=1, axis2=2)
    square_X = jnp.sum(jnp.square(gram_XMM), (1, 2))
    share_X = square_X / jnp.maximum(trace_X, jnp.finfo(jnp.float32).tiny) ** 2
    return jnp.sqrt(jnp.maximum(M * share_X - 1, 0))


def spectra(
    cfg: OptimConfig, axes: AxesTree, moments: dict[tuple, jax.Array], updates: ArrayTree
) -> Metrics:
    """Computes spectral metrics of averaged gradients and updates: medians over sampled matrices.

    Updates include decay and acceleration.

    Args:
        moments: {path: averaged gradient}, from averaged_gradients.
    """
    updates = dict(jax.tree_util.tree_leaves_with_path(updates))
    ranks, conditions, errors = [], [], []
    for path, a in jax.tree_util.tree_leaves_with_path(axes):
        if a.is_matrix:
            rank_X, condition_X = spectrum(_gram(a, moments[path], cfg.per_head))
            ranks.append(rank_X)
            conditions.append(condition_X)
            errors.append(orthogonality_error(_gram(a, updates[path], cfg.per_head)))
    median = lambda parts: jnp.median(jnp.concatenate(parts))
    return {
        "optim/matrices/momentum_stable_rank": median(ranks),
        "optim/matrices/momentum_condition": median(conditions),
        "optim/matrices/update_orthogonality_error": median(errors),
    }


def noise_scales(
    part_squares: Metrics, mean_squares: Metrics, part_tokens: int, parts: int
) -> Metrics:
    """Estimates gradient noise by group and in total.

    `gradient_noise` estimates the trace of the covariance of one token's gradient, and
    `gradient_signal` the squared norm of the true gradient; both are unbiased, so the latter may
    be negative. Their ratio `noise_scale_tokens` is the batch at which noise and gradient are
    equally large: inf if the signal is not positive. Average noise and signal over many steps
    before dividing; the ratio of one step is noisy.

    Source: McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1

    Args:
        part_squares: {group: squared norm of a part's gradient, averaged over the parts}.
        mean_squares: {group: squared norm of the mean gradient}.
        part_tokens: tokens of a part.
        parts: number of parts of the batch, 2 or more.
    """
    # The mean gradient of n tokens has E|g_n|^2 = |G|^2 + noise / n. The parts' squares give one
    # such equation, the batch's square a second one; they are solved for noise and |G|^2.
    part_squares = part_squares | {"all": functools.reduce(operator.add, part_squares.values())}
    mean_squares = mean_squares | {"all": functools.reduce(operator.add, mean_squares.values())}
    metrics = {}
    for name, small in part_squares.items():
        noise = (small - mean_squares[name]) * part_tokens * parts / (parts - 1)
        signal = (parts * mean_squares[name] - small) / (parts - 1)
        positive = signal > 0
        metrics[f"optim/{name}/gradient_noise"] = noise
        metrics[f"optim/{name}/gradient_signal"] = signal
        scale = jnp.where(positive, noise / jnp.where(positive, signal, 1), jnp.inf)
        metrics[f"optim/{name}/noise_scale_tokens"] = scale
    return metrics


def sampled(x: jax.Array) -> jax.Array:
    """Returns at most COORDINATES entries of x, evenly spaced, as float32 [n]."""
    flat = x.reshape(-1)
    return flat[:: max(-(-flat.size // COORDINATES), 1)].astype(jnp.float32)


def tail_index(differences: list[jax.Array]) -> jax.Array:
    """Computes Hill's estimate of the tail index from differences of independent gradients.

    Below 2 the variance is infinite. Gaussian noise has no such index but gives 4 or more, as the
    estimate sees only the largest 1 % of a finite sample. Coordinates are divided by their
    parameter's mean size and pooled: the index describes the pool, not any one of them.

    Source: Hill 1975, https://doi.org/10.1214/aos/1176343247

    Args:
        differences: [n] for each parameter; zeros do not count.
    """
    scaled = []
    for d in differences:
        size = jnp.abs(d.astype(jnp.float32)).reshape(-1)
        scaled.append(size / jnp.maximum(size.mean(), jnp.finfo(jnp.float32).tiny))
    pooled = jnp.concatenate(scaled)
    count = min(max(round(TAIL * pooled.size), 50), pooled.size - 1)
    largest, _ = jax.lax.top_k(pooled, count + 1)
    floor = jnp.maximum(largest[-1], jnp.finfo(jnp.float32).tiny)
    return 1 / jnp.maximum(jnp.mean(jnp.log(jnp.maximum(largest[:-1] / floor, 1))), 1e-6)


def tail_indices(cfg: OptimConfig, axes: AxesTree, differences: ArrayTree) -> Metrics:
    """Computes each group's tail_index from differences of `sampled` gradients, [...,n] a leaf."""
    groups = _by_group(cfg, axes, differences).items()
    return {f"optim/{name}/tail_index": tail_index([d for _, d in rows]) for name, rows in groups}

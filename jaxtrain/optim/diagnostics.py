"""What an optimizer sees and does, group by group: sizes, spectra, gradient noise and its tail.

Every figure is named optim/GROUP/NAME. Spectra are of a few matrices of each parameter, and the
tail of a few thousand coordinates, so that the cost stays near that of one step.
"""

import jax
import jax.numpy as jnp

from jaxtrain.model.trees import named_leaves
from jaxtrain.optim.lmo import build_unit_step, on_each
from jaxtrain.optim.param_groups import group_of
from jaxtrain.optim.sharded_muon import on_owners

MOMENTS = ("momentum", "mean")  # what the states call their averaged gradient
COORDINATES = 8_192  # of each parameter, at even distances, for the tail
TAIL = 0.01  # share of the largest differences that the tail index is read from
EXACT = {"coefficients": "polar_express", "steps": 8}  # singular values end within 1e-3 of 1


def _by_group(cfg, axes, *trees) -> dict:
    """{group's name: [(Axes, leaf of each tree)]}"""
    found = {}
    leaves = [jax.tree.leaves(tree) for tree in (axes, *trees)]
    for a, *rest in zip(*leaves, strict=True):
        found.setdefault(group_of(cfg, a).name, []).append((a, *rest))
    return found


def _square(xs):
    return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in xs)


def squared_norms(cfg, axes, tree) -> dict:
    """{group: float32 []}, squares summed."""
    return {name: _square(x for _, x in rows) for name, rows in _by_group(cfg, axes, tree).items()}


def weight_and_update_sizes(cfg, axes, params, grads, updates) -> dict:
    """Root mean squares of weights and updates, and the cosine of -update and gradient.

    The cosine is 1 for steepest descent and 0 for a step that has forgotten this gradient.
    """
    out = {}
    for name, rows in _by_group(cfg, axes, params, grads, updates).items():
        _, p, g, u = zip(*rows, strict=True)
        numbers = sum(x.size for x in p)
        along = sum(
            jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32))
            for a, b in zip(g, u, strict=True)
        )
        length = jnp.sqrt(_square(g)) * jnp.sqrt(_square(u))
        out[f"optim/{name}/weight_rms"] = jnp.sqrt(_square(p) / numbers)
        out[f"optim/{name}/update_rms"] = jnp.sqrt(_square(u) / numbers)
        out[f"optim/{name}/gradient_rms"] = jnp.sqrt(_square(g) / numbers)
        tiny = jnp.finfo(jnp.float32).tiny
        out[f"optim/{name}/step_gradient_cosine"] = -along / jnp.maximum(length, tiny)
    return out


def dual_norms(cfg, axes, grads, mesh=None) -> dict:
    """<g, unit step of g>, summed over the matrices of each group that follows a norm.

    That is the norm dual to the group's: for spectral steps the sum of singular values, to 0.1 %.
    """
    wanted = {}
    for key, a in named_leaves(axes).items():
        group = group_of(cfg, a)
        if group.geometry:
            wanted.setdefault((group.name, group.geometry), {})[key] = a
    grads, out = named_leaves(grads), {}
    for (name, geometry), members in wanted.items():
        spectral = geometry == "spectral"
        options = EXACT if spectral else {}
        over = on_owners(mesh) if spectral and mesh is not None and mesh.size > 1 else on_each
        per_head = cfg.per_head and all(a.is_matrix for a in members.values())
        step = build_unit_step(geometry, "none", jnp.float32, per_head, over=over, **options)
        own = {key: grads[key].astype(jnp.float32) for key in members}
        units = step(members, own)
        out[f"optim/{name}/gradient_dual_norm"] = sum(jnp.vdot(own[k], units[k]) for k in own)
    return out


def averaged_gradients(opt_state, params) -> dict:
    """{path: averaged gradient} of the parameters, wherever their moments stand in the state."""
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        for i, key in enumerate(path):
            if getattr(key, "name", None) in MOMENTS and shapes.get(path[i + 1 :]) == leaf.shape:
                found[path[i + 1 :]] = leaf
    return found


def _gram(axes, x, per_head):
    """Gram matrices of the first and last matrix in x's stack, [2,M,M], of largest entry 1."""
    axes, x = axes.split_heads(x) if per_head else (axes, x)
    x_XIO = axes.to_matrices(x)[jnp.array([0, -1])].astype(jnp.float32)
    largest = jnp.max(jnp.abs(x_XIO), (-2, -1), keepdims=True)
    x_XIO /= jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)
    equation = "xmn,xkn->xmk" if x_XIO.shape[-2] <= x_XIO.shape[-1] else "xnm,xnk->xmk"
    return jnp.einsum(equation, x_XIO, x_XIO, precision="highest")


def spectrum(gram_XMM):
    """(stable rank, condition) [X] each, of matrices with these Gram matrices.

    The stable rank is |M|_F^2 / |M|_2^2. The condition is from float32 squares: it ends at 2,896,
    where the smallest singular value is lost in their rounding.
    """
    values_XM = jnp.linalg.eigvalsh(gram_XMM)
    largest_X = jnp.maximum(values_XM[:, -1], jnp.finfo(jnp.float32).tiny)
    floor_X = largest_X * jnp.finfo(jnp.float32).eps
    condition_X = jnp.sqrt(largest_X / jnp.maximum(values_XM[:, 0], floor_X))
    return jnp.trace(gram_XMM, axis1=1, axis2=2) / largest_X, condition_X


def orthogonality_error(gram_XMM):
    """sqrt(mean((s^2 / mean(s^2) - 1)^2)) [X] over singular values s: 0 where all are equal."""
    M = gram_XMM.shape[-1]
    trace_X = jnp.trace(gram_XMM, axis1=1, axis2=2)
    square_X = jnp.sum(jnp.square(gram_XMM), (1, 2))
    share_X = square_X / jnp.maximum(trace_X, jnp.finfo(jnp.float32).tiny) ** 2
    return jnp.sqrt(jnp.maximum(M * share_X - 1, 0))


def spectra(cfg, axes, moments, updates) -> dict:
    """Medians over the sampled matrices: of the averaged gradient's spectrum, and of the update's.

    The update is the one applied, decay and acceleration included.

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


def noise_scales(part_squares, mean_squares, part_tokens, parts) -> dict:
    """Gradient noise by group and in all: the batch at which noise and gradient are level.

    `gradient_noise` estimates the trace of the covariance of one token's gradient, and
    `gradient_signal` the squared norm of the true gradient; both are unbiased, so the latter may
    come out negative. Average each over many steps before dividing: the ratio of one step,
    `noise_scale_tokens`, is inf where the signal does not show.

    Source: McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1

    Args:
        part_squares: {group: mean over the parts of their gradient's squared norm}.
        mean_squares: {group: squared norm of the mean gradient}.
        part_tokens: tokens of a part.
        parts: how many make the batch, 2 or more.
    """
    part_squares = part_squares | {"all": sum(part_squares.values())}
    mean_squares = mean_squares | {"all": sum(mean_squares.values())}
    out = {}
    for name, small in part_squares.items():
        noise = (small - mean_squares[name]) * part_tokens * parts / (parts - 1)
        signal = (parts * mean_squares[name] - small) / (parts - 1)
        shows = signal > 0
        out[f"optim/{name}/gradient_noise"] = noise
        out[f"optim/{name}/gradient_signal"] = signal
        scale = jnp.where(shows, noise / jnp.where(shows, signal, 1), jnp.inf)
        out[f"optim/{name}/noise_scale_tokens"] = scale
    return out


def sampled(x):
    """float32 [n]: at most COORDINATES entries of x, at even distances."""
    flat = x.reshape(-1)
    return flat[:: max(-(-flat.size // COORDINATES), 1)].astype(jnp.float32)


def tail_index(differences):
    """Hill's estimate of the tail index from differences of independent gradients.

    Below 2 the variance is infinite; Gaussian noise gives 4 or more, as the estimate reads only
    the largest 1 % and no sample shows a tail's end. It speaks of coordinates that are pooled
    after division by their parameter's mean size, not of any one of them.

    Source: Hill 1975, https://doi.org/10.1214/aos/1176343247

    Args:
        differences: list of [n], a parameter each; zeros do not count.
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


def tail_indices(cfg, axes, differences) -> dict:
    """tail_index of each group; differences as from `sampled`, [..., n] a parameter."""
    rows = _by_group(cfg, axes, differences).items()
    return {f"optim/{name}/tail_index": tail_index([d for _, d in group]) for name, group in rows}

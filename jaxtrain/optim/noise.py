"""Heavy-tailed gradient noise, to compare optimizers when the variance is infinite."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.optim import Hyperparameter, check_number, how_to_set, is_number, is_zero
from jaxtrain.optim.precision import widest

UNIFORM_BITS = 31  # of 32 random bits; the last one is the sign


class NoiseState(NamedTuple):
    count: jax.Array  # int32 [], good steps: those with finite gradients
    seed: jax.Array  # int32 []; in the state, so that all seeds share one compiled step
    rms: optax.Updates  # RMS of each leaf's first good gradient, [], float32 or wider


def symmetric_lomax(key: jax.Array, shape: tuple[int, ...], alpha: Hyperparameter) -> jax.Array:
    """Draws float32 values of density alpha/2 * (1 + |x|)^-(alpha + 1), up to |x| = 2^(32/alpha).

    Moments below alpha are finite: with alpha <= 2 the variance is infinite. The mean of |x| is
    1 / (alpha - 1).

    Source: Lomax 1954, https://doi.org/10.1080/01621459.1954.10501239
    """
    bits = jax.random.bits(key, shape, jnp.uint32)
    sign = 1 - 2 * (bits & 1).astype(jnp.float32)
    # u is converted from an integer, so it has 24 significant bits however small it is. A uniform
    # float draw has steps of 2^-24, which would leave gaps in the far tail.
    u = ((bits >> 1).astype(jnp.float32) + 0.5) * 2.0**-UNIFORM_BITS
    return sign * jnp.expm1(-jnp.log(u) / alpha)


def heavy_tailed_noise(
    alpha: Hyperparameter, scale: Hyperparameter, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Adds scale * RMS * symmetric Lomax noise of tail index alpha to each gradient.

    RMS is that of the leaf's first gradient, so the noise does not shrink during training. Draws
    depend only on the seed, the count of good steps and the leaf's path: they are the same on any
    mesh. The sum has the widest type of gradient and parameter, float32 at least.
    `update(..., good=False)` leaves the state unchanged.

    Args:
        alpha: tail index, above 1, as the noise would otherwise have no mean.
        scale: 0 or more; the number 0 returns the identity, which has no state.

    Raises:
        ValueError: alpha or scale is out of range.
    """
    check_number(alpha, "alpha", "optim.noise_tail")
    check_number(scale, "scale", "optim.noise_scale")
    if is_number(alpha) and alpha <= 1:
        hint = how_to_set("alpha", "optim.noise_tail")
        raise ValueError(f"alpha must be above 1; got {alpha}. {hint}")
    if is_zero(scale):
        return optax.with_extra_args_support(optax.identity())

    def init(params):
        rms = jax.tree.map(lambda p: jnp.zeros((), widest(p)), params)
        return NoiseState(jnp.zeros((), jnp.int32), jnp.asarray(seed, jnp.int32), rms)

    def update(updates, state, params=None, *, good: jax.Array | bool = True, **extra):
        del extra
        params = updates if params is None else params
        step_key = jax.random.fold_in(jax.random.key(state.seed), state.count)
        first = (state.count == 0) & good

        def first_rms(g, rms):
            return jnp.where(first, jnp.sqrt(jnp.mean(jnp.square(g.astype(rms.dtype)))), rms)

        def add_noise(path, g, rms, p):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            key = jax.random.fold_in(step_key, zlib.crc32(name.encode()))
            noise = scale * rms * symmetric_lomax(key, g.shape, alpha)
            return (g.astype(widest(g, p)) + noise).astype(widest(g, p))

        rms = jax.tree.map(first_rms, updates, state.rms)
        noised = jax.tree_util.tree_map_with_path(add_noise, updates, rms, params)
        return noised, NoiseState(state.count + jnp.where(good, 1, 0), state.seed, rms)

    return optax.GradientTransformationExtraArgs(init, update)

"""Learning-rate schedules: updates made -> share of the peak rate, in [0, 1]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtrain.config.sections import OptimConfig
from jaxtrain.optim import select_option


def _wsd(cfg, steps_left):
    """Stays constant, then falls linearly over the last decay_fraction of the run.

    Source: Hu et al. 2024 (MiniCPM), https://arxiv.org/abs/2404.06395
    """
    decay_steps = max(round(cfg.decay_fraction * cfg.total_steps), 1)
    return jnp.minimum(steps_left / decay_steps, 1)


def _cosine(cfg, steps_left):
    """Follows half a cosine from the end of the warm-up to the end of the run.

    Source: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983
    """
    share = jnp.minimum(steps_left / max(cfg.total_steps - cfg.warmup_steps, 1), 1)
    return jnp.sin(jnp.pi / 2 * share) ** 2  # (1 + cos) / 2, which float32 rounds to 0 near the end


def _constant(cfg, steps_left):
    del cfg
    return jnp.ones_like(steps_left)


# (OptimConfig, steps left) -> 1 at the peak rate, 0 at final_scale, linear between the two
SCHEDULES = {"wsd": _wsd, "cosine": _cosine, "constant": _constant}


def build_schedule(cfg: OptimConfig) -> Callable[[jax.Array | int], jax.Array]:
    """Builds schedule(updates made) -> share of the peak rate.

    It is 1/warmup_steps at 0 and final_scale from total_steps on; `constant` stays at 1.
    """
    decay = select_option(SCHEDULES, cfg.schedule, "optim.schedule")

    def schedule(count):
        count = jnp.asarray(count)
        steps_left = jnp.maximum(cfg.total_steps - count, 0).astype(float)
        share = decay(cfg, steps_left)
        scale = cfg.final_scale * (1 - share) + share
        warmup = (count + 1).astype(float) / max(cfg.warmup_steps, 1)
        return jnp.where(steps_left > 0, jnp.minimum(warmup, scale), scale)

    return schedule

"""Schedules: count of updates made -> share of the peak rate, in [0, 1]."""

import jax.numpy as jnp

from jaxtrain.optim import pick


def _wsd(cfg, left):
    """Flat, then a straight line over the last decay_fraction of the run.

    Source: Hu et al. 2024 (MiniCPM), https://arxiv.org/abs/2404.06395
    """
    decay_steps = max(round(cfg.decay_fraction * cfg.total_steps), 1)
    return jnp.minimum(left / decay_steps, 1)


def _cosine(cfg, left):
    """Half a cosine from the end of the warm-up to the end of the run.

    Source: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983
    """
    share = jnp.minimum(left / max(cfg.total_steps - cfg.warmup_steps, 1), 1)
    return jnp.sin(jnp.pi / 2 * share) ** 2  # (1 + cos) / 2, which float32 rounds to 0 near the end


def _constant(cfg, left):
    del cfg
    return jnp.ones_like(left)


# (OptimConfig, steps left) -> place between final_scale, 0, and the peak, 1.
SCHEDULES = {"wsd": _wsd, "cosine": _cosine, "constant": _constant}


def build_schedule(cfg):
    """count -> scale of an OptimConfig: 1/warmup_steps at count 0, final_scale from total_steps on.

    `constant` has no end: it stays at 1.
    """
    place = pick(SCHEDULES, cfg.schedule, "optim.schedule")

    def schedule(count):
        """int32 [] -> float []."""
        count = jnp.asarray(count)
        left = jnp.maximum(cfg.total_steps - count, 0).astype(float)
        share = place(cfg, left)
        scale = cfg.final_scale * (1 - share) + share
        warm = (count + 1).astype(float) / max(cfg.warmup_steps, 1)
        return jnp.where(left > 0, jnp.minimum(warm, scale), scale)

    return schedule

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim.schedule import SCHEDULES, build_schedule


def scales(counts, **values):
    schedule = build_schedule(OptimConfig(**values))
    return np.asarray(jax.jit(schedule)(jnp.asarray(counts, jnp.int32)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_at_most_1_and_positive_on_every_step_of_the_run(schedule):
    for warmup, total, share, final in itertools.product(
        (0, 1, 10, 300), (1, 2, 11, 200), (0.0, 0.3, 1.0), (0.0, 0.1, 1.0)
    ):
        cfg = OptimConfig(
            schedule=schedule,
            warmup_steps=warmup,
            total_steps=total,
            decay_fraction=share,
            final_scale=final,
        )
        y = np.asarray(build_schedule(cfg)(jnp.arange(203)))
        assert np.all((0 <= y) & (y <= 1)), (warmup, total, share, final)
        assert np.all(y[:total] > 0), (warmup, total, share, final)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_is_a_straight_line_from_one_step_to_the_peak(schedule):
    y = scales(np.arange(10), schedule=schedule, warmup_steps=10, total_steps=1_000)
    np.testing.assert_allclose(y, np.arange(1, 11) / 10, rtol=1e-6)


def test_wsd_is_constant_and_then_falls_in_a_straight_line_to_the_final_scale():
    y = scales(
        np.arange(130),
        schedule="wsd",
        warmup_steps=5,
        total_steps=100,
        decay_fraction=0.4,
        final_scale=0.1,
    )
    assert np.all(y[5:61] == 1)
    np.testing.assert_allclose(np.diff(y[60:101]), -0.9 / 40, rtol=1e-4)
    np.testing.assert_allclose(y[100:], 0.1, rtol=1e-6)


def test_cosine_falls_from_the_end_of_warm_up_to_the_final_scale():
    y = scales(np.arange(130), schedule="cosine", warmup_steps=20, total_steps=100, final_scale=0.2)
    t = np.arange(20, 101)
    half = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * (t - 20) / 80))
    np.testing.assert_allclose(y[20:101], half, atol=1e-6)
    np.testing.assert_allclose(y[100:], 0.2, rtol=1e-6)


def test_constant_stays_at_1_after_the_run():
    assert np.all(scales([10, 99, 100, 10**6], schedule="constant", total_steps=100) == 1)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_last_step_of_a_very_long_run_has_a_positive_rate(schedule):
    total = 2_000_000_000
    counts = [total - 1, total]
    y = scales(counts, schedule=schedule, total_steps=total, decay_fraction=1.0)
    assert y[0] > 0 and y[1] == 0


def test_an_unknown_schedule_lists_the_known_ones():
    cfg = dataclasses.replace(OptimConfig())
    object.__setattr__(cfg, "schedule", "triangle")
    with pytest.raises(ValueError, match="wsd, cosine, constant.*--optim.schedule"):
        build_schedule(cfg)

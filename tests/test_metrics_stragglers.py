"""Simulated probes: each draw is a run whose ranks have noisy values."""

import numpy as np
import pytest

from jaxtrain.metrics.stragglers import QUORUM, RATIO, WINDOW, StragglerRule

RANKS = [2, 3, 8, 64]
DRAWS = 100


def noise(rng, probes, ranks):
    """Returns factors [probes, ranks, 4]: normal, heavy-tailed, with spikes, and very noisy."""
    normal, wide = 0.03 * rng.standard_normal((2, probes, ranks))
    heavy = 0.05 * rng.standard_t(2, (probes, ranks))
    is_disturbed = rng.random((probes, ranks)) < 0.1
    spikes = np.where(is_disturbed, 1.2 + rng.pareto(1.0, (probes, ranks)), 1.0)
    return np.stack([np.exp(normal), np.exp(heavy), np.exp(normal) * spikes, np.exp(10 * wide)], -1)


@pytest.mark.parametrize("ranks", RANKS)
def test_noise_alone_names_no_straggler_in_100_draws(ranks):
    for draw in range(DRAWS):
        rule = StragglerRule(ranks, 4)
        for values_RK in noise(np.random.default_rng(draw), 2 * WINDOW, ranks):
            rule.add(values_RK)
            assert not rule.is_slow_RK.any(), (draw, np.argwhere(rule.is_slow_RK))


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_that_is_1_3_times_as_slow_is_named_in_its_first_window(ranks):
    named = np.zeros(2)
    for draw in range(DRAWS):
        rule, slow = StragglerRule(ranks, 2), draw % ranks
        for values_RK in noise(np.random.default_rng(draw), WINDOW, ranks)[..., [0, 2]]:
            values_RK[slow] *= 1.3
            rule.add(values_RK)
        named += rule.is_slow_RK[slow]
        assert not np.delete(rule.is_slow_RK, slow, 0).any()
    assert named[0] == DRAWS  # with normal noise
    assert named[1] >= 0.6 * DRAWS  # a tenth of the others' probes are lengthened too


def test_several_stragglers_are_named_if_most_ranks_are_not():
    rule = StragglerRule(8, 1)
    for _ in range(WINDOW):
        rule.add(np.array([1.0, 1.4, 1.0, 1.0, 2.0, 1.0, 1.2, 1.0])[:, None])
    assert rule.is_slow_RK[:, 0].nonzero()[0].tolist() == [1, 4, 6]
    np.testing.assert_allclose(rule.ratios_RK[:, 0], [1, 1.4, 1, 1, 2, 1, 1.2, 1])


def test_a_straggler_is_named_after_enough_slow_probes_and_until_enough_normal_ones():
    rule, states = StragglerRule(3, 1), []
    for factor in [1.0] * 20 + [1.05 * RATIO] * 20 + [1.0] * 20:
        rule.add(np.array([[1.0], [factor], [1.0]]))
        states.append(bool(rule.is_slow_RK[1, 0]))
    first, last = states.index(True), len(states) - states[::-1].index(True)
    assert first == 20 + QUORUM - 1 and last == 40 + QUORUM - 1
    assert all(states[first:last])

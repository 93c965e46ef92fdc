"""Weights of an average of checkpoints: they are those of a decay."""

import numpy as np
import pytest

from jaxtrain.branching.weights import DECAYS, merge_weights

FACTORS = {
    "sqrt": lambda x: 1 - np.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}


@pytest.mark.parametrize("decay", DECAYS)
def test_wsm_weights_give_the_weights_that_a_decay_of_the_rate_would_have_given(decay):
    steps = [100, 130, 200, 220]  # not equally far apart
    rng = np.random.default_rng(0)
    # The same move at every step between two checkpoints, scaled by the decay's factor.
    moves = np.repeat(rng.normal(size=(len(steps) - 1, 5)), np.diff(steps), 0)
    plain = np.cumsum(np.vstack([np.zeros(5), moves]), 0)
    fine = 1_000  # substeps, to integrate the factor over each step
    places = (np.arange(len(moves) * fine) + 0.5) / (len(moves) * fine)
    factors = FACTORS[decay](places).reshape(-1, fine).mean(1)
    decayed = (factors[:, None] * moves).sum(0)
    checkpoints = plain[np.array(steps) - steps[0]]
    average = np.array(merge_weights(steps, "wsm", decay)) @ checkpoints
    np.testing.assert_allclose(average, decayed, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["uniform", "linear", "wsm"])
def test_weights_are_positive_and_their_sum_is_one(scheme):
    weights = merge_weights([3, 5, 9, 20], scheme)
    assert min(weights) > 0 and sum(weights) == pytest.approx(1, abs=1e-15)


def test_uniform_and_linear_weights_are_those_of_their_names():
    assert merge_weights([1, 2, 9, 10], "uniform") == [0.25] * 4
    assert merge_weights([1, 2, 9, 10], "linear") == [0.1, 0.2, 0.3, 0.4]

"""The last part of a step (rate, decay, norms) equals twins in NumPy and float64."""

import numpy as np
import pytest
from optimizer_twins import (
    ADAM_RATE,
    RATE,
    Adam,
    Muon,
    assert_histories_agree,
    decoupled,
    draw,
    train_ours,
    train_twin,
)


def cautious(p, u, rate, decay):
    """One line of Algorithm 1 of https://arxiv.org/abs/2510.12402."""
    return p - rate * (u + decay * p * (u * p > 0))


@pytest.mark.parametrize("name, twin, rate", [("muon", Muon, RATE), ("adamw", Adam, ADAM_RATE)])
@pytest.mark.parametrize("is_cautious", [False, True])
def test_weight_decay_equals_its_twin_over_50_steps(name, twin, rate, is_cautious):
    ours, _ = train_ours(name=name, weight_decay=1.0, cautious_decay=is_cautious)
    expected = train_twin(twin, cautious if is_cautious else decoupled, decay=1.0, rate=rate)
    assert_histories_agree([params for params, _ in ours], expected)


def test_cautious_decay_shrinks_only_entries_that_the_step_moves_towards_zero():
    first = lambda **options: train_ours(weight_decay=1.0, **options)[0][0][0]
    start, ours, plain = draw(0), first(cautious_decay=True), first(decay_groups="")
    for name in ("w_in", "w_out", "embed"):
        towards_zero = (np.asarray(plain[name]) - start[name]) * start[name] < 0
        shrunk = np.abs(np.asarray(ours[name])) < np.abs(np.asarray(plain[name]))
        assert np.array_equal(shrunk, towards_zero), name

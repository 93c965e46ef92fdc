"""Coordinate descent on invented losses, and the ladders that it climbs."""

import math

import pytest

from jaxtrain.study.search import (
    Ladder,
    Pending,
    name_setting,
    search_coordinates,
    search_grid,
)

RATE, OTHER, MOMENTUM = "optim.learning_rate", "optim.adam_learning_rate", "optim.momentum"
GRID = {RATE: (0.01, 0.02, 0.04), OTHER: (0.001, 0.002, 0.004)}


def bowl(rate, other=0.002):
    """Returns a loss whose lowest point is at these two rates, on a logarithmic scale."""
    return lambda s: math.log(s[RATE] / rate) ** 2 + math.log(s[OTHER] / other) ** 2


def tune(loss_of, budget, grid=None, start=None):
    """Runs a search to its end; returns its choice and the settings in the order of their runs."""
    losses, order = {}, []
    while True:
        try:
            return search_coordinates("x", grid or GRID, losses, budget, start), order
        except Pending as pending:
            # One at a time: a process takes the first, and looks again when it has ended.
            setting = pending.settings[0]
            assert name_setting(setting) not in losses
            losses[name_setting(setting)] = loss_of(setting)
            order.append(setting)


@pytest.mark.parametrize(
    ("name", "values", "lower", "higher"),
    [
        (RATE, (0.01, 0.02), 0.005, 0.04),
        (RATE, (0.04, 0.01), 0.0025, 0.16),  # in any order
        (MOMENTUM, (0.9, 0.95), 0.8, 0.975),  # the ratio of 1 - value
        (MOMENTUM, (0.5, 0.9), None, 0.98),  # below 0 is not valid
        ("optim.strength", (0.25, 0.5), 0.125, 1.0),
        ("optim.strength", (0.5, 1.0), 0.25, None),  # the field's upper bound
        ("optim.weight_decay", (0.0, 0.1, 0.2), None, 0.4),
        ("optim.ns_steps", (4, 8), 2, 16),  # whole numbers stay whole
        ("optim.name", ("muon", "adamw"), None, None),
        (RATE, (0.01,), None, None),
    ],
)
def test_a_ladder_goes_on_by_the_ratio_of_its_last_two_values(name, values, lower, higher):
    ladder = Ladder(name, values)
    if ladder.numeric:
        assert ladder.neighbour(min(values), -1) == lower
        assert ladder.neighbour(max(values), 1) == higher
    assert type(higher) in (type(None), type(values[0]))


def test_the_first_round_tries_the_whole_grid_of_each_field_from_the_middle():
    choice, order = tune(bowl(0.02), 99)
    assert [tuple(s.values()) for s in order] == [
        (0.02, 0.002),
        (0.01, 0.002),
        (0.04, 0.002),
        (0.02, 0.001),
        (0.02, 0.004),
    ]
    assert choice.values == order[0] and not choice.edges and not choice.extended
    assert choice.stopped == "no change of one field improved it"


def test_rates_are_tuned_before_other_fields():
    grid = {MOMENTUM: (0.9, 0.95), OTHER: GRID[OTHER], RATE: GRID[RATE]}
    _, order = tune(bowl(0.02), 99, grid)
    changed = [next(k for k in s if s[k] != order[0][k]) for s in order[1:6]]
    assert changed == [RATE, RATE, OTHER, OTHER, MOMENTUM]


def test_the_grid_is_extended_while_the_best_value_is_at_its_edge():
    choice, order = tune(bowl(0.1), 99)
    assert choice.values == {RATE: 0.08, OTHER: 0.002}
    assert choice.extended == {RATE: [0.08, 0.16]} and not choice.edges
    assert [s[RATE] for s in order[:5]] == [0.02, 0.01, 0.04, 0.08, 0.16]


def test_an_edge_that_the_budget_leaves_is_reported():
    choice, order = tune(bowl(10.0), 5)
    assert len(order) == len(choice.losses) == 5
    assert choice.edges == {RATE: 0.16} and choice.extended == {RATE: [0.08, 0.16]}
    assert choice.stopped == "its budget of 5 runs was spent"


@pytest.mark.parametrize("budget", range(2, 13))
def test_no_search_makes_more_runs_than_its_budget(budget):
    for loss in (bowl(0.02), bowl(10.0, 1e-6), lambda s: 1.0, lambda s: s[RATE] % 0.013):
        choice, order = tune(loss, budget)
        assert len(order) == len({name_setting(s) for s in order}) <= budget
        assert set(choice.losses) == {name_setting(s) for s in order}


def test_a_later_round_follows_a_field_that_depends_on_another():
    # The second rate should be a tenth of the first, so that neither can go far on its own.
    log2 = lambda x: math.log(x) ** 2
    loss = lambda s: 1.5 * log2(s[RATE] / 0.08) + log2(s[OTHER] / s[RATE] / 0.1)
    choice, _ = tune(loss, 99)
    assert choice.values == {RATE: 0.08, OTHER: 0.008}
    after_one_round, _ = tune(loss, 6)
    assert after_one_round.values == {RATE: 0.04, OTHER: 0.004}


def test_a_search_that_starts_from_an_earlier_setting_tries_only_its_neighbours():
    start = {RATE: 0.08, OTHER: 0.002}  # beyond the grid: the earlier search has extended it
    choice, order = tune(bowl(0.04), 3, start=start)
    assert [s[RATE] for s in order] == [0.08, 0.04, 0.16]
    assert choice.values == {RATE: 0.04, OTHER: 0.002}
    choice, order = tune(bowl(0.08), 99, start=start)
    assert choice.values == start and len(order) == 5


def test_fields_without_an_order_are_tried_but_not_extended():
    grid = {"optim.ns_coefficients": ("jordan", "polar_express"), **GRID}
    better = lambda s: bowl(0.02)(s) - (s["optim.ns_coefficients"] == "jordan")
    choice, order = tune(better, 99, grid)
    assert choice.values["optim.ns_coefficients"] == "jordan" and not choice.edges
    assert len(order) == 5 + 1 + 4  # the rates are tried again after the name has changed


def test_weight_decay_of_zero_is_no_edge():
    grid = {"optim.weight_decay": (0.0, 0.1, 0.2)}
    choice, _ = tune(lambda s: s["optim.weight_decay"], 99, grid)
    assert choice.values == {"optim.weight_decay": 0.0} and not choice.edges


def test_settings_that_can_run_at_once_are_pending_together():
    with pytest.raises(Pending) as first:
        search_coordinates("x", GRID, {}, 9)
    with pytest.raises(Pending) as sweep:
        search_coordinates("x", GRID, {"learning_rate=0.02,adam_learning_rate=0.002": 1.0}, 9)
    assert len(first.value.settings) == 1 and len(sweep.value.settings) == 2


def test_a_diverged_start_is_left_and_a_search_without_a_finite_loss_is_an_error():
    choice, _ = tune(lambda s: math.inf if s[RATE] > 0.006 else 1.0, 99)
    assert choice.values[RATE] == 0.005
    with pytest.raises(ValueError, match="all 3 of x diverged.*study.grid.x"):
        tune(lambda s: math.inf, 3)


def test_a_grid_search_tries_every_combination():
    with pytest.raises(Pending) as pending:
        search_grid("x", GRID, {})
    assert len(pending.value.settings) == 9
    losses = {name_setting(s): bowl(0.04)(s) for s in pending.value.settings}
    choice = search_grid("x", GRID, losses)
    assert choice.values == {RATE: 0.04, OTHER: 0.002} and choice.edges == {RATE: 0.04}

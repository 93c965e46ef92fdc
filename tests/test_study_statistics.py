import math

import numpy as np
import pytest
from scipy import stats

from jaxtrain.study.statistics import (
    LOSES,
    TIES,
    TRACK_3_SIGMAS,
    UNDECIDED,
    WINS,
    decide_verdict,
    detectable,
    first_reach,
    holm,
    mean_sd,
    paired_tests,
    pooled_sd,
    track_3,
)


def paired_test(losses, baseline):
    return paired_tests({"base": baseline, "other": losses}, "base")["other"]


BASE = [2.11, 2.13, 2.09, 2.12, 2.10]
OTHER = [2.09, 2.10, 2.08, 2.10, 2.08]


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_the_paired_test_equals_scipys(n):
    losses, base = np.random.default_rng(n).normal(2.1, 0.02, (2, n))
    paired, reference = paired_test(losses, base), stats.ttest_rel(losses, base)
    assert paired.t == pytest.approx(reference.statistic, rel=1e-11)
    assert paired.p == pytest.approx(reference.pvalue, rel=1e-11)
    assert paired.difference == pytest.approx(np.mean(losses) - np.mean(base), rel=1e-9)


def test_three_pairs_give_the_t_and_p_computed_by_hand():
    paired = paired_test([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])  # mean 2, sd 1
    assert paired.difference == 2 and paired.se == pytest.approx(1 / math.sqrt(3))
    assert paired.t == pytest.approx(2 * math.sqrt(3))
    # With 2 degrees of freedom the two-sided p has the closed form 1 - t / sqrt(t**2 + 2).
    assert paired.p == pytest.approx(1 - paired.t / math.sqrt(paired.t**2 + 2), rel=1e-12)


def test_swapping_the_sides_changes_only_the_sign():
    paired, swapped = paired_test(OTHER, BASE), paired_test(BASE, OTHER)
    assert (paired.t, paired.difference) == (-swapped.t, -swapped.difference)
    assert (paired.se, paired.p) == (swapped.se, swapped.p)


def test_equal_losses_give_no_difference_and_a_p_of_1():
    same = paired_test(BASE, BASE)
    assert (same.difference, same.se, same.t, same.p) == (0, 0, 0, 1)
    assert decide_verdict(BASE, BASE, same.p, 0.05) == TIES


def test_holm_corrections_equal_those_by_hand_in_the_order_given():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_a_contender_without_a_p_counts_as_a_comparison():
    corrected = holm([math.nan, 0.01])
    assert math.isnan(corrected[0]) and corrected[1] == pytest.approx(0.02)


def test_a_verdict_depends_on_the_level_and_on_the_sign():
    assert decide_verdict(OTHER, BASE, 0.049, 0.05) == WINS
    assert decide_verdict(BASE, OTHER, 0.049, 0.05) == LOSES
    assert decide_verdict(OTHER, BASE, 0.051, 0.05) == TIES


def test_two_pairs_never_win_however_far_apart():
    losses, base = [1.0, 1.0001], [9.0, 9.0]
    p = paired_test(losses, base).p
    assert p < 0.05 and decide_verdict(losses, base, p, 0.05) == UNDECIDED


def test_a_diverged_contender_loses_and_a_diverged_baseline_leaves_it_undecided():
    broken = [2.0, math.inf, 2.0]
    assert math.isnan(paired_test(broken, BASE[:3]).p)
    assert decide_verdict(broken, BASE[:3], math.nan, 0.05) == LOSES
    assert decide_verdict(BASE[:3], broken, math.nan, 0.05) == UNDECIDED
    assert mean_sd(broken)[0] == math.inf


def test_the_detectable_difference_has_a_p_equal_to_the_level():
    paired = paired_test(OTHER, BASE)
    moved = np.array(OTHER) - paired.difference + detectable(paired, 0.05)
    assert paired_test(moved, BASE).p == pytest.approx(0.05, rel=1e-6)


def test_sigma_is_pooled_by_degrees_of_freedom():
    groups = [[1.0, 3.0], [10.0, 11.0, 12.0]]  # sums of squares 2 and 2, degrees of freedom 1 and 2
    assert pooled_sd(groups) == pytest.approx(math.sqrt(4 / 3))
    assert pooled_sd([*groups, [1.0, math.inf], [5.0]]) == pooled_sd(groups)
    assert math.isnan(pooled_sd([[1.0]]))


def test_the_track_3_statistic_passes_ten_runs_and_not_four():
    runs = [3.2785] * 10
    assert track_3(runs, 3.28) == pytest.approx(0.0015 * math.sqrt(10))
    assert track_3(runs, 3.28) > 0.004 > track_3(runs[:4], 3.28)
    assert stats.norm.sf(TRACK_3_SIGMAS) == pytest.approx(0.001, rel=0.05)


def test_a_loss_is_reached_on_the_straight_line_between_two_points():
    steps, losses = [0, 10, 20, 30], [4.0, 3.0, 2.0, 2.5]
    assert first_reach(steps, losses, 2.5) == 15
    assert first_reach(steps, losses, 5.0) == 0
    assert math.isnan(first_reach(steps, losses, 1.0))
    assert first_reach([1, 2], [math.inf, 1.0], 1.5) == 2


def test_the_error_is_pooled_over_contenders_except_for_one_that_varies_more():
    random = np.random.default_rng(0)
    losses = {name: random.normal(2, 0.01, 3) for name in "abcdef"} | {"wild": [2.0, 2.9, 2.4]}
    tests = paired_tests(losses, "a")
    own = stats.ttest_rel(losses["wild"], losses["a"])
    assert (tests["wild"].degrees, tests["wild"].p) == (2, pytest.approx(own.pvalue))
    calm = paired_tests({name: losses[name] for name in "abcdef"}, "a")
    assert {test.degrees for test in calm.values()} == {5 * 2}
    table = np.stack([losses[name] for name in "abcdef"])
    residuals = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    assert calm["b"].se == pytest.approx(math.sqrt(2 / 3 * (residuals**2).sum() / 10))


def test_pooling_makes_false_alarms_as_often_as_the_level_says():
    random, alarms = np.random.default_rng(0), []
    for _ in range(300):
        seeds = random.normal(0, 1, 3)  # shared by all contenders
        losses = {name: seeds + random.normal(0, 0.01, 3) for name in "abcde"}
        alarms += [test.p < 0.05 for name, test in paired_tests(losses, "a").items() if name != "a"]
    assert 0.03 < np.mean(alarms) < 0.07

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
    detectable,
    holm,
    judge,
    mean_sd,
    paired_test,
    pooled_sd,
    reach,
    track_3,
)

BASE = [2.11, 2.13, 2.09, 2.12, 2.10]
OTHER = [2.09, 2.10, 2.08, 2.10, 2.08]


def test_the_paired_test_is_scipys():
    ours, theirs = paired_test(OTHER, BASE), stats.ttest_rel(OTHER, BASE)
    assert ours.t == pytest.approx(theirs.statistic, rel=1e-12)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-12)
    assert ours.difference == pytest.approx(np.mean(OTHER) - np.mean(BASE), rel=1e-9)


def test_three_pairs_by_hand():
    ours = paired_test([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])  # mean 2, sd 1
    assert ours.difference == 2 and ours.se == pytest.approx(1 / math.sqrt(3))
    assert ours.t == pytest.approx(2 * math.sqrt(3))
    assert ours.p == pytest.approx(0.074180, abs=1e-6)  # of t = 3.4641, 2 degrees of freedom


def test_swapping_the_sides_changes_the_sign_alone():
    ours, swapped = paired_test(OTHER, BASE), paired_test(BASE, OTHER)
    assert (ours.t, ours.difference) == (-swapped.t, -swapped.difference)
    assert (ours.se, ours.p) == (swapped.se, swapped.p)


def test_equal_losses_differ_by_nothing_with_certainty():
    same = paired_test(BASE, BASE)
    assert (same.difference, same.se, same.t, same.p) == (0, 0, 0, 1)
    assert judge(BASE, BASE, same.p, 0.05) == TIES


def test_holm_by_hand_in_the_order_given():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_a_contender_without_a_p_still_counts_among_the_comparisons():
    corrected = holm([math.nan, 0.01])
    assert math.isnan(corrected[0]) and corrected[1] == pytest.approx(0.02)


def test_a_verdict_needs_the_level_and_takes_the_sign():
    assert judge(OTHER, BASE, 0.049, 0.05) == WINS
    assert judge(BASE, OTHER, 0.049, 0.05) == LOSES
    assert judge(OTHER, BASE, 0.051, 0.05) == TIES


def test_fewer_than_three_pairs_never_win_however_far_apart():
    losses, base = [1.0, 1.0001], [9.0, 9.0]
    p = paired_test(losses, base).p
    assert p < 0.05 and judge(losses, base, p, 0.05) == UNDECIDED


def test_a_contender_that_diverges_loses_and_a_baseline_that_does_decides_nothing():
    broken = [2.0, math.inf, 2.0]
    assert math.isnan(paired_test(broken, BASE[:3]).p)
    assert judge(broken, BASE[:3], math.nan, 0.05) == LOSES
    assert judge(BASE[:3], broken, math.nan, 0.05) == UNDECIDED
    assert mean_sd(broken)[0] == math.inf


def test_the_detectable_difference_is_where_p_meets_the_level():
    paired = paired_test(OTHER, BASE)
    moved = np.array(OTHER) - paired.difference + detectable(paired, 0.05)
    assert paired_test(moved, BASE).p == pytest.approx(0.05, rel=1e-6)


def test_sigma_is_pooled_by_degrees_of_freedom():
    groups = [[1.0, 3.0], [10.0, 11.0, 12.0]]  # squares 2 of 1 and 2 of 2
    assert pooled_sd(groups) == pytest.approx(math.sqrt(4 / 3))
    assert pooled_sd([*groups, [1.0, math.inf], [5.0]]) == pooled_sd(groups)
    assert math.isnan(pooled_sd([[1.0]]))


def test_track_3_is_the_rule_of_the_track():
    runs = [3.2785] * 10
    assert track_3(runs, 3.28) == pytest.approx(0.0015 * math.sqrt(10))
    assert track_3(runs, 3.28) > 0.004 > track_3(runs[:4], 3.28)  # ten runs pass, four do not
    assert stats.norm.sf(TRACK_3_SIGMAS) == pytest.approx(0.001, rel=0.05)


def test_a_loss_is_reached_on_the_line_between_two_points():
    steps, losses = [0, 10, 20, 30], [4.0, 3.0, 2.0, 2.5]
    assert reach(steps, losses, 2.5) == 15
    assert reach(steps, losses, 5.0) == 0
    assert math.isnan(reach(steps, losses, 1.0))
    assert reach([1, 2], [math.inf, 1.0], 1.5) == 2

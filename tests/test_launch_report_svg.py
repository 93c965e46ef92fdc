"""Charts have round ticks, labels that do not overlap, and few enough points."""

import pytest

from launch.report.formats import short
from launch.report.svg import apart, thin, ticks


@pytest.mark.parametrize(
    "low, high", [(0, 1), (3.2, 5.6), (0.0071, 0.0093), (0, 652_000), (990, 1040)]
)
def test_ticks_are_few_round_numbers_inside_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 5 and low <= found[0] and found[-1] <= high
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125" and float(f"{step:.0e}") == pytest.approx(step)


def test_labels_are_moved_apart_in_order():
    placed = apart([100, 101, 99, 180, 181], 10, 182)
    gaps = sorted(placed)
    assert all(b - a >= 12.999 for a, b in zip(gaps, gaps[1:], strict=False)) and gaps[-1] <= 182
    assert placed[2] < placed[0] < placed[1] < placed[3] < placed[4]


def test_thinning_keeps_the_extremes_and_the_order():
    points = [(i, (i * 7919) % 1009) for i in range(5_000)]
    thinned = thin(points)
    assert len(thinned) <= 320 and thinned == sorted(thinned)
    assert max(y for _, y in thinned) == max(y for _, y in points)


def test_short_numbers_have_at_most_three_digits_and_a_suffix():
    assert [short(x) for x in (0.35, 1500, 15_000, 3.25e6, 0, 999.6)] == [
        *("0.35", "1500", "15k", "3.25M", "0", "1000")
    ]

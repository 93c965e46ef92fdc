"""What a baseline's check can see is estimated, and the estimate is that of real checks."""

import random

import pytest
from run_directories import series, write_run

from launch.report.baseline import check, record
from launch.report.power import COUNTS, Simulation, Timed, describe_power
from launch.report.run_folder import read_run

SPEED = {"tokens_per_s": Timed(-1, 1, 0.01), "step_p50_s": Timed(1, -1, 0.01)}


def draw_times(rng, spread, slowdown=0.0, steps=60):
    factor = (1 + slowdown) * (1 + rng.gauss(0, spread))
    return [factor * t for t in series(steps, seed=rng.randrange(1 << 30))]


@pytest.fixture(scope="module")
def simulation():
    rng = random.Random(0)
    return Simulation([draw_times(rng, 0.02) for _ in range(6)], SPEED, 0.99, 2.0)


def test_more_runs_catch_more_and_larger_slow_downs_are_caught_more_often(simulation):
    shares = [simulation.breaches(count, 0.1, 0.02) for count in COUNTS]
    assert all(a <= b + 0.03 for a, b in zip(shares, shares[1:], strict=False)), shares
    shares = [simulation.breaches(5, slowdown, 0.02) for slowdown in (0.0, 0.05, 0.1, 0.3, 1.0)]
    assert shares == sorted(shares) and shares[0] < 0.03 and shares[-1] > 0.97
    assert simulation.runs_needed(0.05, 0.002) < simulation.runs_needed(0.05, 0.01)
    assert simulation.runs_needed(0.05, 0.1) is None


def test_a_real_check_does_what_the_estimate_says(tmp_path):
    rng, caught, alarms, draws = random.Random(1), 0, 0, 12
    for draw in range(draws):
        runs = [
            read_run(write_run(tmp_path / f"{draw}-{i}", draw_times(rng, 0.02))) for i in range(5)
        ]
        baseline = record(runs, 0.99)
        least = baseline["power"]["least_caught"]
        for name, slowdown in (("equal", 0.0), ("slow", least)):
            path = write_run(tmp_path / f"{draw}-{name}", draw_times(rng, 0.02, slowdown))
            rows = check(baseline, read_run(path))
            timed = [row["state"] for row in rows if row["figure"] in SPEED]
            caught += name == "slow" and "BREACH" in timed
            alarms += name == "equal" and "BREACH" in timed
        if draw == 0:
            assert 0.001 < baseline["power"]["false_alarms"] < 0.05
    assert alarms <= 2 and caught >= 8, (alarms, caught)


def test_the_sentences_name_the_slow_down_the_false_alarms_and_the_runs_needed(tmp_path):
    rng = random.Random(2)
    paths = [write_run(tmp_path / str(i), draw_times(rng, 0.05)) for i in range(3)]
    many, one = (record([read_run(path) for path in some], 0.99) for some in (paths, paths[:1]))
    text = " ".join(describe_power(many["power"]))
    assert "slower is reported 9 times of 10" in text and "10% " in text and " runs" in text
    text = " ".join(describe_power(one["power"]))
    assert "differences between runs, which one run does not show" in text
    assert 0.2 < one["power"]["false_alarms_if_unknown"] < 0.6
    assert "not estimated" in describe_power({})[0]
    wild = {"least_caught": None, "false_alarms": 0.0, "between": None}
    assert "not even one 200% slower" in describe_power(wild | {"false_alarms_if_unknown": 0})[0]

"""What a baseline's check can see is estimated, and the estimate is that of real checks."""

import json
import random

import pytest
from run_directories import series, write_run

from launch.report import baseline as baselines
from launch.report import power as power_lib
from launch.report.baseline import check, record
from launch.report.power import COUNTS, Simulation, confidence_of_each, describe_power
from launch.report.run_folder import read_run
from launch.report.slo_figures import FIGURES
from launch.report.stats import t_quantile

SPEED = ["tokens_per_s", "step_p50_s"]


def draw_times(rng, spread, slowdown=0.0, steps=60):
    factor = (1 + slowdown) * (1 + rng.gauss(0, spread))
    return [factor * t for t in series(steps, seed=rng.randrange(1 << 30))]


def draw_run(folder, rng, spread, slowdown=0.0, goodput=None):
    """Returns a run whose speed is drawn; `goodput` replaces its own."""
    write_run(folder, draw_times(rng, spread, slowdown))
    if goodput:
        summary = json.loads((folder / "summary.json").read_text()) | {"perf/goodput": goodput}
        (folder / "summary.json").write_text(json.dumps(summary))
    return read_run(folder)


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    rng, folder = random.Random(0), tmp_path_factory.mktemp("runs")
    runs = [draw_run(folder / str(i), rng, 0.02) for i in range(6)]
    return Simulation(runs, SPEED, 0.99)


def test_more_runs_catch_more_and_larger_slow_downs_are_caught_more_often(simulation):
    shares = [simulation.breaches(count, 0.1, 0.02) for count in COUNTS]
    assert all(a <= b + 0.03 for a, b in zip(shares, shares[1:], strict=False)), shares
    shares = [simulation.breaches(5, slowdown, 0.02) for slowdown in (0.0, 0.05, 0.1, 0.3, 1.0)]
    assert shares == sorted(shares) and shares[0] < 0.03 and shares[-1] > 0.97
    assert simulation.runs_needed(0.05, 0.002) < simulation.runs_needed(0.05, 0.01)
    assert simulation.runs_needed(0.05, 0.1) is None


def test_a_real_check_does_what_the_estimate_says(tmp_path, monkeypatch):
    monkeypatch.setattr(power_lib, "DRAWS", 500)
    rng, caught, alarms, draws = random.Random(1), 0, 0, 12
    for draw in range(draws):
        runs = [draw_run(tmp_path / f"{draw}-{i}", rng, 0.02) for i in range(5)]
        baseline = record(runs, 0.95)
        least = baseline["power"]["least_caught"]
        for name, slowdown in (("equal", 0.0), ("slow", least)):
            run = draw_run(tmp_path / f"{draw}-{name}", rng, 0.02, slowdown)
            broken = "BREACH" in {row["state"] for row in check(baseline, run)}
            caught += name == "slow" and broken
            alarms += name == "equal" and broken
        if draw == 0:
            assert 0.001 < baseline["power"]["false_alarms"] < 0.05
    assert alarms <= 2 and caught >= 8, (alarms, caught)


def test_the_false_alarms_are_those_of_all_enforced_figures(tmp_path):
    rng = random.Random(3)
    make = lambda i: draw_run(tmp_path / str(i), rng, 0.0, goodput=0.8 * (1 + rng.gauss(0, 0.03)))
    runs = [make(i) for i in range(5)]
    timed = Simulation(runs, ["tokens_per_s", "step_p50_s"], 0.95).breaches(5, 0.0, 0.0)
    baseline = record(runs, 0.95)
    names = [name for name, entry in baseline["figures"].items() if entry["bound"] is not None]
    assert {"goodput", "hbm_headroom", "effective_bytes_per_s"} <= set(names)
    alarms = Simulation(runs, names, 0.95).breaches(5, 0.0, 0.0)
    alone = Simulation(runs, ["goodput"], confidence_of_each(0.95, len(names))).breaches(5, 0, 0)
    assert alone > 0.005 and alarms > max(alone, timed) - 0.003
    assert baseline["power"]["figures"] == len(names) == 5
    assert abs(baseline["power"]["false_alarms"] - alarms) < 0.01


def test_each_bound_is_widened_for_the_number_of_enforced_figures(tmp_path, monkeypatch):
    rng = random.Random(4)
    runs = [draw_run(tmp_path / str(i), rng, 0.02) for i in range(5)]
    tolerances = {}
    for names in (["step_p50_s"], ["step_p50_s", "tokens_per_s", "effective_bytes_per_s"]):
        monkeypatch.setattr(baselines, "FIGURES", {name: FIGURES[name] for name in names})
        entry = record(runs, 0.95)["figures"]["step_p50_s"]
        tolerances[len(names)] = entry["bound"] / entry["value"] - 1
    monkeypatch.undo()
    ratio = t_quantile(1 - 0.05 / 3, 4) / t_quantile(0.95, 4)
    assert 1.05 * ratio > tolerances[3] / tolerances[1] > 0.95 * ratio > 1.2
    assert record(runs, 0.95)["confidence"] == 0.95


def test_a_figure_that_is_too_loose_to_enforce_does_not_widen_the_others(tmp_path):
    found = []
    for name, goodputs in (("wild", (0.001, 0.9, 0.03)), ("equal", (0.8,) * 3)):
        runs = [
            draw_run(tmp_path / f"{name}{i}", random.Random(i), 0.002, goodput=g)
            for i, g in enumerate(goodputs)
        ]
        found.append(record(runs, 0.95))
    wild, equal = found
    assert "too loose to enforce" in wild["figures"]["goodput"]["how"]
    assert wild["power"]["figures"] == equal["power"]["figures"] - 1
    p50 = [baseline["figures"]["step_p50_s"]["bound"] for baseline in found]
    assert p50[0] < p50[1]


def test_the_sentences_name_the_slow_down_the_false_alarms_and_the_runs_needed(tmp_path):
    rng = random.Random(2)
    runs = [draw_run(tmp_path / str(i), rng, 0.05) for i in range(3)]
    for count in (1, 2, 3):
        power = record(runs[:count], 0.95)["power"]
        text = " ".join(describe_power(power))
        assert (
            "slower is reported 9 times of 10" in text and "by mistake, over all enforced" in text
        )
        assert "5% more than 30 runs" in text and "10% " in text
        assert ("(assumed)" in text) == ("fewer than 3 runs do not show it" in text) == (count < 3)
        assert {1: 0.2, 2: 0.01, 3: 0.0}[count] < power["false_alarms"] < 0.6
    assert "not even one 200% slower" in describe_power(power | {"least_caught": None})[0]

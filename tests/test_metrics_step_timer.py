import time

import numpy as np
import pytest

from jaxtrain.metrics.step_timer import StepTimer


class Hand:
    """A clock moved by hand, s."""

    def __init__(self):
        self.now_s = 1_000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def hand():
    return Hand()


@pytest.fixture
def clock(hand):
    clock = StepTimer(tokens_per_step=100, now=hand)
    hand.now_s += 60  # compiling
    clock.start()
    return clock


def run_steps(clock, hand, times_s):
    for time_s in times_s:
        hand.now_s += time_s
        clock.tick()


def pause(clock, hand, cause, seconds):
    with clock.pause(cause):
        hand.now_s += seconds


def test_percentiles_are_numpys(clock, hand):
    times_s = np.random.default_rng(0).lognormal(-1, 0.5, 999)
    run_steps(clock, hand, times_s)
    total = clock.total()
    for name, q in {"": 50, "_p95": 95, "_p99": 99, "_max": 100}.items():
        assert total[f"perf/step_time{name}_s"] == pytest.approx(np.percentile(times_s, q))


def test_pauses_are_not_step_time_and_are_counted_by_cause(clock, hand):
    run_steps(clock, hand, [0.25, 0.25])
    pause(clock, hand, "eval", 3.0)
    pause(clock, hand, "save", 1.0)
    pause(clock, hand, "eval", 0.5)
    run_steps(clock, hand, [0.25, 0.25])
    summary = clock.summary()
    assert summary["perf/step_time_max_s"] == pytest.approx(0.25)
    assert summary["perf/pause_eval_s"] == pytest.approx(3.5)
    assert summary["perf/pause_save_s"] == pytest.approx(1.0)
    assert summary["perf/tokens_per_s"] == pytest.approx(400)
    assert summary["perf/tokens_per_s_actual"] == pytest.approx(400 / 5.5)


def test_a_wait_for_data_is_counted_but_stays_in_the_step(clock, hand):
    for _ in range(4):
        pause(clock, hand, "data", 0.25)  # beside the step before
        run_steps(clock, hand, [0.75])
    summary = clock.summary()
    assert summary["perf/step_time_s"] == pytest.approx(1.0)
    assert summary["data/wait_s"] == pytest.approx(0.25)


def test_steps_and_pauses_make_up_the_whole_wall_time(clock, hand):
    rng = np.random.default_rng(0)
    for _ in range(50):
        pause(clock, hand, ["eval", "save", "data"][rng.integers(3)], rng.random())
        run_steps(clock, hand, rng.random(2))
    total = clock.total()
    paused_s = total["perf/pause_eval_s"] + total["perf/pause_save_s"]
    steps_s = total["perf/goodput"] * total["perf/wall_s"]
    assert steps_s + paused_s == pytest.approx(total["perf/wall_s"])
    assert total["perf/wall_s"] == pytest.approx(hand.now_s - 1_060)
    assert total["perf/tokens"] == 100 * total["perf/steps"] == 10_000


def test_a_summary_covers_only_the_time_since_the_last_one(clock, hand):
    run_steps(clock, hand, [5.0, 5.0])
    pause(clock, hand, "eval", 7.0)
    clock.summary()
    run_steps(clock, hand, [0.5, 0.5])
    summary = clock.summary()
    assert summary["perf/step_time_max_s"] == pytest.approx(0.5)
    assert summary["perf/tokens_per_s_actual"] == pytest.approx(200)
    assert "perf/pause_eval_s" not in summary
    assert clock.total()["perf/step_time_max_s"] == pytest.approx(5.0)


def test_a_pause_before_a_summary_is_not_charged_to_the_step_after_it(clock, hand):
    run_steps(clock, hand, [0.5])
    pause(clock, hand, "save", 9.0)
    clock.summary()
    run_steps(clock, hand, [0.5])
    assert clock.summary()["perf/step_time_max_s"] == pytest.approx(0.5)


def test_a_run_without_a_step_has_no_step_times(clock, hand):
    pause(clock, hand, "eval", 2.0)
    assert clock.summary() == {"perf/pause_eval_s": pytest.approx(2.0)}
    total = clock.total()
    assert total["perf/steps"] == 0 and "perf/step_time_s" not in total


def test_an_exception_in_a_pause_still_counts_its_time(clock, hand):
    with pytest.raises(KeyboardInterrupt), clock.pause("eval"):
        hand.now_s += 2.0
        raise KeyboardInterrupt
    run_steps(clock, hand, [0.5])
    assert clock.summary()["perf/step_time_s"] == pytest.approx(0.5)


def test_goodput_and_what_was_lost_add_up_to_the_wall_time(clock, hand):
    clock.start({"compile": 60.0, "restart": 0.0})
    run_steps(clock, hand, [1.0, 1.0])
    pause(clock, hand, "data", 0.5)
    run_steps(clock, hand, [1.0])  # fed: the device was at work throughout the wait
    pause(clock, hand, "save", 3.0)
    hand.now_s += 2.0
    clock.tick(skipped=True)
    hand.now_s += 0.25  # after the last step
    total = clock.total()
    lost = clock.lost_s(total["perf/wall_s"])
    expected = {"compile": 60.0, "save": 3.0, "skipped": 2.0, "other": 0.25}
    assert lost == pytest.approx(expected)
    good_s = total["perf/goodput"] * total["perf/wall_s"]
    assert good_s == pytest.approx(3.5) and total["perf/wall_s"] == pytest.approx(68.75)
    assert good_s + sum(lost.values()) == pytest.approx(total["perf/wall_s"])


def test_a_step_without_a_batch_lost_what_it_took_above_the_others(clock, hand):
    run_steps(clock, hand, [1.0, 1.0, 1.0])
    pause(clock, hand, "data", 1.5)
    clock.starved(throughout=False)
    run_steps(clock, hand, [0.1])  # 1.6 in all, where 1.0 is usual
    pause(clock, hand, "data", 0.25)
    clock.starved(throughout=True)  # nothing was in flight: all of the wait is lost
    run_steps(clock, hand, [1.0])
    assert clock.lost_s(clock.total()["perf/wall_s"])["data"] == pytest.approx(0.6 + 0.25)


def test_a_windows_goodput_is_of_its_own_time(clock, hand):
    run_steps(clock, hand, [1.0])
    hand.now_s += 0.5  # of the next step, under way when the window is summed up
    assert clock.summary()["perf/goodput"] == pytest.approx(1.0)
    run_steps(clock, hand, [0.5])
    pause(clock, hand, "eval", 3.0)
    summary = clock.summary()
    assert summary["perf/goodput"] == pytest.approx(0.25)
    assert summary["perf/tokens_per_s_actual"] == pytest.approx(100 / 4)


@pytest.mark.parametrize("misuse", ["tick", "pause"])
def test_a_pause_holds_neither_a_tick_nor_another_pause(clock, misuse):
    with pytest.raises(AssertionError, match="inside pause"), clock.pause("eval"):
        if misuse == "tick":
            clock.tick()
        with clock.pause("save"):
            pass


def test_the_real_clock_measures_real_time():
    clock = StepTimer(tokens_per_step=1)
    clock.start()
    time.sleep(0.05)
    with clock.pause("eval"):
        time.sleep(0.2)
    clock.tick()
    summary = clock.summary()
    assert summary["perf/step_time_s"] >= 0.05 and summary["perf/pause_eval_s"] >= 0.2
    assert summary["perf/tokens_per_s_actual"] <= 1 / 0.25

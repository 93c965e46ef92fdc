import time

import numpy as np
import pytest

from jaxtrain.metrics.step_timer import StepTimer


class FakeClock:
    """A clock that the test moves, s."""

    def __init__(self):
        self.now_s = 1_000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def timer(clock):
    timer = StepTimer(tokens_per_step=100, now=clock)
    clock.now_s += 60  # compiling
    timer.start()
    return timer


def run_steps(timer, clock, times_s):
    for time_s in times_s:
        clock.now_s += time_s
        timer.tick()


def pause(timer, clock, cause, seconds):
    with timer.pause(cause):
        clock.now_s += seconds


def test_percentiles_equal_numpys(timer, clock):
    times_s = np.random.default_rng(0).lognormal(-1, 0.5, 999)
    run_steps(timer, clock, times_s)
    total = timer.total()
    for name, q in {"": 50, "_p95": 95, "_p99": 99, "_max": 100}.items():
        assert total[f"perf/step_time{name}_s"] == pytest.approx(np.percentile(times_s, q))


def test_pauses_are_counted_by_cause_and_not_as_step_time(timer, clock):
    run_steps(timer, clock, [0.25, 0.25])
    pause(timer, clock, "eval", 3.0)
    pause(timer, clock, "save", 1.0)
    pause(timer, clock, "eval", 0.5)
    run_steps(timer, clock, [0.25, 0.25])
    summary = timer.summary()
    assert summary["perf/step_time_max_s"] == pytest.approx(0.25)
    assert summary["perf/pause_eval_s"] == pytest.approx(3.5)
    assert summary["perf/pause_save_s"] == pytest.approx(1.0)
    assert summary["perf/tokens_per_s"] == pytest.approx(400)
    assert summary["perf/tokens_per_s_actual"] == pytest.approx(400 / 5.5)


def test_a_wait_for_data_is_counted_but_stays_in_the_step(timer, clock):
    for _ in range(4):
        pause(timer, clock, "data", 0.25)  # while the device runs the previous step
        run_steps(timer, clock, [0.75])
    summary = timer.summary()
    assert summary["perf/step_time_s"] == pytest.approx(1.0)
    assert summary["data/wait_s"] == pytest.approx(0.25)


def test_steps_and_pauses_add_up_to_the_wall_time(timer, clock):
    rng = np.random.default_rng(0)
    for _ in range(50):
        pause(timer, clock, ["eval", "save", "data"][rng.integers(3)], rng.random())
        run_steps(timer, clock, rng.random(2))
    total = timer.total()
    paused_s = total["perf/pause_eval_s"] + total["perf/pause_save_s"]
    steps_s = total["perf/goodput"] * total["perf/wall_s"]
    assert steps_s + paused_s == pytest.approx(total["perf/wall_s"])
    assert total["perf/wall_s"] == pytest.approx(clock.now_s - 1_060)
    assert total["perf/tokens"] == 100 * total["perf/steps"] == 10_000


def test_a_summary_covers_only_the_time_since_the_last_one(timer, clock):
    run_steps(timer, clock, [5.0, 5.0])
    pause(timer, clock, "eval", 7.0)
    timer.summary()
    run_steps(timer, clock, [0.5, 0.5])
    summary = timer.summary()
    assert summary["perf/step_time_max_s"] == pytest.approx(0.5)
    assert summary["perf/tokens_per_s_actual"] == pytest.approx(200)
    assert "perf/pause_eval_s" not in summary
    assert timer.total()["perf/step_time_max_s"] == pytest.approx(5.0)


def test_a_pause_before_a_summary_is_not_part_of_the_next_step(timer, clock):
    run_steps(timer, clock, [0.5])
    pause(timer, clock, "save", 9.0)
    timer.summary()
    run_steps(timer, clock, [0.5])
    assert timer.summary()["perf/step_time_max_s"] == pytest.approx(0.5)


def test_a_run_without_a_step_has_no_step_times(timer, clock):
    pause(timer, clock, "eval", 2.0)
    assert timer.summary() == {"perf/pause_eval_s": pytest.approx(2.0)}
    total = timer.total()
    assert total["perf/steps"] == 0 and "perf/step_time_s" not in total


def test_an_exception_in_a_pause_still_counts_its_time(timer, clock):
    with pytest.raises(KeyboardInterrupt), timer.pause("eval"):
        clock.now_s += 2.0
        raise KeyboardInterrupt
    run_steps(timer, clock, [0.5])
    assert timer.summary()["perf/step_time_s"] == pytest.approx(0.5)


def test_goodput_and_lost_time_add_up_to_the_wall_time(timer, clock):
    timer.start({"compile": 60.0, "restart": 0.0})
    run_steps(timer, clock, [1.0, 1.0])
    pause(timer, clock, "data", 0.5)
    run_steps(timer, clock, [1.0])  # the device was busy throughout the wait
    pause(timer, clock, "save", 3.0)
    clock.now_s += 2.0
    timer.tick(skipped=True)
    clock.now_s += 0.25  # after the last step
    total = timer.total()
    lost = timer.lost_s(total["perf/wall_s"])
    expected = {"compile": 60.0, "save": 3.0, "skipped": 2.0, "other": 0.25}
    assert lost == pytest.approx(expected)
    good_s = total["perf/goodput"] * total["perf/wall_s"]
    assert good_s == pytest.approx(3.5) and total["perf/wall_s"] == pytest.approx(68.75)
    assert good_s + sum(lost.values()) == pytest.approx(total["perf/wall_s"])


def test_a_step_that_waited_for_a_batch_lost_its_excess_over_the_usual_time(timer, clock):
    run_steps(timer, clock, [1.0, 1.0, 1.0])
    pause(timer, clock, "data", 1.5)
    timer.starved(throughout=False)
    run_steps(timer, clock, [0.1])  # 1.6 in all; 1.0 is usual
    pause(timer, clock, "data", 0.25)
    timer.starved(throughout=True)  # nothing was in flight: all of the wait is lost
    run_steps(timer, clock, [1.0])
    assert timer.lost_s(timer.total()["perf/wall_s"])["data"] == pytest.approx(0.6 + 0.25)


def test_the_goodput_of_a_window_covers_only_its_own_time(timer, clock):
    run_steps(timer, clock, [1.0])
    clock.now_s += 0.5  # part of the next step, which is running when the window ends
    assert timer.summary()["perf/goodput"] == pytest.approx(1.0)
    run_steps(timer, clock, [0.5])
    pause(timer, clock, "eval", 3.0)
    summary = timer.summary()
    assert summary["perf/goodput"] == pytest.approx(0.25)
    assert summary["perf/tokens_per_s_actual"] == pytest.approx(100 / 4)


@pytest.mark.parametrize("misuse", ["tick", "pause"])
def test_neither_a_tick_nor_another_pause_may_be_inside_a_pause(timer, misuse):
    with pytest.raises(AssertionError, match="inside pause"), timer.pause("eval"):
        if misuse == "tick":
            timer.tick()
        with timer.pause("save"):
            pass


def test_the_default_clock_measures_real_time():
    timer = StepTimer(tokens_per_step=1)
    timer.start()
    time.sleep(0.05)
    with timer.pause("eval"):
        time.sleep(0.2)
    timer.tick()
    summary = timer.summary()
    assert summary["perf/step_time_s"] >= 0.05 and summary["perf/pause_eval_s"] >= 0.2
    assert summary["perf/tokens_per_s_actual"] <= 1 / 0.25


def test_a_host_is_late_only_in_steps_that_the_device_was_waiting_for(timer, clock):
    run_steps(timer, clock, [1.0])
    clock.now_s += 0.25  # logging
    pause(timer, clock, "data", 0.5)
    timer.starved(throughout=False)
    run_steps(timer, clock, [0.25])
    pause(timer, clock, "save", 7.0)
    pause(timer, clock, "data", 0.5)  # the device was busy for longer than that
    run_steps(timer, clock, [0.5])
    assert timer.late_shares() == {"data": pytest.approx(0.5 / 3), "host": pytest.approx(0.25 / 3)}
    assert timer.late_shares() == {"data": 0.0, "host": 0.0}

import dataclasses
import math
import time

from jaxtrain.benchmarks import step_timing
from jaxtrain.benchmarks.child import BenchJob
from jaxtrain.benchmarks.timing import TimedCall, interleave, summarise, time_call, warm_up
from jaxtrain.config.train_config import TrainConfig


def test_variants_take_turns_after_two_calls_that_are_not_counted():
    calls = []
    variants = {name: lambda turn, name=name: calls.append((name, turn)) for name in "ABC"}
    first_s = warm_up(variants, most_s=60)
    samples = interleave(variants, rounds=3)
    assert calls[:6] == [(name, turn) for name in "ABC" for turn in (0, 1)]
    assert calls[6:] == [(name, turn) for turn in (2, 3, 4) for name in "ABC"]
    assert first_s.keys() == samples.keys() == set("ABC")
    assert {len(taken) for taken in samples.values()} == {3}


def test_a_slow_variant_skips_later_rounds_and_the_others_go_on():
    variants = {"slow": lambda _: time.sleep(0.02), "quick": lambda _: None}
    samples = interleave(variants, rounds=4, most_s=0.01)
    assert {name: len(taken) for name, taken in samples.items()} == {"slow": 1, "quick": 4}


def test_sleep_takes_wall_time_only_and_work_takes_cpu_time_too():
    asleep = time_call(time.sleep, 0.2)

    def work():
        end_s = time.process_time() + 0.2
        while time.process_time() < end_s:
            pass

    awake = time_call(work)
    assert asleep.wall_s >= 0.2 and asleep.cpu_s < asleep.wall_s
    assert min(awake.wall_s, awake.cpu_s) >= 0.2
    assert math.isnan(awake.others) or 0 <= awake.others < 1.5


def test_a_summary_has_the_medians_and_the_fastest_call():
    samples = [TimedCall(wall_s, wall_s / 2, 0.0) for wall_s in (0.03, 0.01, 0.02)]
    summary = summarise(samples)
    assert summary["wall_s"] == 0.02 and summary["wall_min_s"] == 0.01
    assert summary["cpu_s"] == 0.01 and summary["samples"] == 3


def test_a_launch_that_blocks_until_its_step_is_done_distorts_neither_times_nor_their_number(
    monkeypatch,
):
    monkeypatch.setattr(step_timing, "gpu_clocks", lambda: "")
    cfg = TrainConfig()
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=1))
    job = BenchJob("train", batch=1, most_s=0.7)
    launch = lambda batch: time.sleep(0.1) or "launched"
    row = step_timing.time_steps(job, cfg, launch, lambda launched: None)
    assert 5 <= row["samples"] == len(row["steps_s"]) <= 7
    assert min(row["steps_s"]) >= 0.1 and max(row["steps_s"]) < 0.18

"""The order in which the suite for GPUs measures its rows, with fake children on a fake H100."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import pytest

from jaxtrain import bench
from jaxtrain.benchmarks import gpu_training, suites
from jaxtrain.benchmarks.child import BenchJob, job_config
from jaxtrain.benchmarks.first_day_results import find_left, find_problems
from jaxtrain.benchmarks.gpu_items import OPTIMIZERS, SIZES, VARIANTS, build_items, guess_seconds
from jaxtrain.benchmarks.gpu_results import describe, newest_ratios

DEVICE = {"device": "NVIDIA H100 80GB HBM3", "bytes_limit": 70 * 2**30}
STEP = {"step_s": 0.5, "optimizer_s": 0.05, "optimizer_range_s": [0.04, 0.06], "host_s": 0.01}
STEP |= {"tokens_per_step": 524_288, "first_step_s": 30.0, "idle_share": 0.01}
TWO_SIZES = ("gpt_124m", "gpt_350m")


@pytest.fixture
def measure(monkeypatch):
    """Returns a function that runs the suite for two sizes: (its rows, its children's jobs).

    `child` gives the result of a child of a variant.
    """

    def run(child, finished=(), **flags):
        jobs = []

        def run_child(module, job, folder, limit_s, env):
            if job.kind == "about":
                return DEVICE
            jobs.append(job)
            Path(job.cache).mkdir(parents=True, exist_ok=True)
            return child("jaxtrain" if module == "jax_child" else "pytorch", job)

        monkeypatch.setattr(gpu_training, "run_child", run_child)
        args = dict(minutes=60.0, seconds=8.0, tiny=False, rows=0, trace="", resume=False)
        args |= dict(sizes=TWO_SIZES, optimizers=("muon",), variants=VARIANTS)
        args = Namespace(**args | flags, finished=list(finished))
        return list(gpu_training.measure(args)), jobs

    monkeypatch.setattr(gpu_training, "check_gpu", lambda tiny: None)
    monkeypatch.setattr(gpu_training.tuning, "choices_for", lambda chip: ())  # none to try
    # Estimates of memory, which take most of the time and are tested elsewhere.
    monkeypatch.setattr(gpu_training, "first_rows", lambda *args: 32)
    monkeypatch.setattr(gpu_training, "estimate_memory", lambda *args: Namespace(peak=1))
    return run


def faster_halves(variant, job):
    """Returns the result of a child: 1,000 tokens/s, in smaller micro-batches of PyTorch twice."""
    is_fast = variant == "pytorch" and job.rows < 32
    return STEP | {"tokens_per_s": 2_000.0 if is_fast else 1_000.0}


def test_muon_in_both_frameworks_comes_first_and_every_item_once():
    items = build_items(SIZES, OPTIMIZERS, VARIANTS)
    assert len(set(items)) == len(items) == 4 * 5 + 1 + 8
    assert [item.what for item in items[:9]] == ["step"] * 8 + ["warm start"]
    assert {(item.optimizer, item.half) for item in items[:9]} == {("muon", False)}
    assert {(item.optimizer, item.half) for item in items[9:17]} == {("muon", True)}
    assert not any(item.half for item in items[17:])
    assert not any(i.optimizer == "accelerated_lmo" and i.variant == "pytorch" for i in items)


def test_every_size_is_measured_before_any_at_half_its_micro_batch_size(measure):
    rows, jobs = measure(faster_halves, optimizers=("muon", "adamw"), trace="my traces")
    pairs = [(size, 32) for size in TWO_SIZES for _ in VARIANTS]
    started = [(job.size, job.rows) for job in jobs]
    assert started[:5] == [*pairs, ("gpt_350m", 32)]  # the last is the warm start
    assert started[5:9] == [(size, rows // 2) for size, rows in pairs]
    assert [job.rows for job in jobs[9:13]] == [32, 16, 32, 16]  # AdamW: each at its fastest
    traces = [job.trace for job in jobs if job.optimizer == "muon" and job.trace]
    assert len(set(traces)) == 8 and all(trace.startswith("my traces/gpt") for trace in traces)
    halves = [row for row in rows if row.get("half")]
    assert [(row["case"], row["rows"]) for row in halves[:2]] == [("gpt_124m muon", 16)] * 2


def test_half_the_micro_batch_size_is_not_tried_if_there_is_none_or_the_step_failed(measure):
    rows, jobs = measure(lambda variant, job: {"error": "exit status 1"}, sizes=["gpt_124m"])
    assert [row.get("half", False) for row in rows[1:]] == [False] * 3 and len(jobs) == 2
    assert rows[-1]["what"] == "warm start" and "compile cache failed" in rows[-1]["error"]
    rows, jobs = measure(faster_halves, rows=1)
    assert [job.rows for job in jobs] == [1] * 5


def test_rows_for_which_no_time_is_left_are_named_and_measured_by_the_next_call(measure):
    rows, jobs = measure(faster_halves, minutes=0.5)  # less than any row may take
    assert not jobs and all(row["unfinished"] for row in rows[1:])
    finished = [row for row in rows if not row.get("unfinished")]
    assert len(measure(faster_halves, finished)[1]) == 9


def test_a_row_that_its_child_could_not_complete_is_a_figure_and_a_problem(measure):
    killed = {"tokens_per_s": 9.0, "incomplete": "killed: it took more than the 60 s"}
    step = {key: value for key, value in STEP.items() if not key.startswith("optimizer")}
    only = dict(sizes=["gpt_124m"], variants=["jaxtrain"])
    rows, _ = measure(lambda variant, job: step | killed, **only)
    assert "9 tokens/s" in describe(rows[1] | {"step_p95_s": 0.5, "peak_bytes": None})
    problem = f"gpt_124m muon jaxtrain step: {killed['incomplete']}"
    assert find_problems(rows)[0] == problem and not find_left(rows)
    assert measure(lambda variant, job: step, rows, **only)[1] == []  # it is not repeated


def ratios(rows):
    return [row["value"] for row in rows if row.get("what") == "ratio"]


def test_a_ratio_is_computed_again_from_a_row_of_a_later_call(measure):
    rows, _ = measure(faster_halves, sizes=["gpt_124m"])
    assert ratios(rows) == [1.0, 0.5] and ratios(newest_ratios(rows)) == [0.5]
    finished = [row for row in rows if row.get("what") != "ratio"]
    assert len(newest_ratios(rows)) == len(finished) + 1
    assert finished[-1]["variant"] == "pytorch" and finished[-1]["half"]
    rows, jobs = measure(faster_halves, finished[:-1], sizes=["gpt_124m"])
    assert len(jobs) == 1 and ratios(rows)[-1] == 0.5


def test_the_stored_rows_have_only_the_newest_ratio_of_a_case(tmp_path, monkeypatch):
    rows = [{"case": "a", "what": "ratio", "value": value} for value in (1.0, 0.5)]
    monkeypatch.setitem(suites.SUITES, "gpu", lambda args, rounds: (([row], "") for row in rows))
    bench.main(["--suite=gpu", f"--json={tmp_path}/rows.jsonl"])
    stored = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert ratios(stored) == [0.5]


def test_more_unrolled_layers_are_expected_to_take_longer_to_compile():
    def guess(size, remat="auto"):
        model = job_config(BenchJob("train", size)).model
        model = dataclasses.replace(model, remat=remat)
        return guess_seconds("jaxtrain", model, "h100", 8.0)

    scanned = guess("gpt_774m", "attention")
    assert scanned < guess("gpt_124m") < guess("gpt_350m") < guess("gpt_774m")

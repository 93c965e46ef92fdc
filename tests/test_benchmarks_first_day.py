"""Suite first-day, with small programs as stages: some are slow, wrong, hang or crash."""

import argparse
import functools
import importlib.util
import json
import os
import signal
import sys
import time

import pytest

from jaxtrain import bench
from jaxtrain.benchmarks import (
    first_day,
    first_day_results,
    first_day_stages,
    gpu_training,
    suites,
)
from jaxtrain.benchmarks.first_day_stages import STAGES, Stage, build_argv, choose_stages

PROGRAM = """
import json, os, pathlib, signal, sys, time
kind, path, minutes = sys.argv[1], pathlib.Path(sys.argv[2]), float(sys.argv[3])
until = time.monotonic() + 60 * minutes
if kind == "hang":
    time.sleep(60)
if kind == "crash":
    print("an illegal memory access", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if kind == "garbage":
    path.write_text("{")
if kind == "wrong":
    timing = {"median_s": 1e-6}
    contests = {"attention": {"contestants": {"triton": "wrong: off by 0.3", "xla": timing}}}
    contests |= {"norm": {"contestants": {"triton": timing, "tokamax": "it is not installed"}}}
    contests = {name: contest | {"done": True} for name, contest in contests.items()}
    contests |= {"head": {"contestants": {"xla": timing}}}
    path.write_text(json.dumps({"contests": contests}))
if kind == "good":
    path.write_text(json.dumps({"value": 1}))
if kind == "slow":  # a row takes 0.2 s; the one that is running when the time is up is lost
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    while len(rows) < 4 and time.monotonic() + 0.2 < until:
        time.sleep(0.2)
        rows.append(os.getpid())
        path.write_text(json.dumps({"rows": rows, "left": ["more"] if len(rows) < 4 else []}))
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Returns a function that runs a slice with fake stages: (exit status, output, record)."""
    monkeypatch.setattr(first_day_stages, "LEAST_MINUTES", 0.004)
    (tmp_path / "program.py").write_text(PROGRAM)
    out = tmp_path / "day"

    def run(stages, minutes=1.0, names=()):
        lines = []
        args = argparse.Namespace(out=out, minutes=minutes, tiny=True, stages=list(names))
        status = first_day.run_suite(args, lines.append, stages)
        record = json.loads((out / first_day.RECORD).read_text())
        return status, "\n".join(lines), record["stages"]

    run.out = out
    return run


def fake(kind, minutes=1.0, **fields):
    command = f"{{python}} {{dir}}/../program.py {kind} {{dir}}/{kind}.json {{minutes}}"
    return Stage(kind, minutes, command, "", f"{kind}.json", **fields)


def test_a_stage_that_hangs_crashes_or_writes_no_result_costs_only_itself(suite):
    kinds = ("hang", "crash", "garbage", "silent", "good")
    stages = [fake(kind, 0.015 if kind == "hang" else 1.0) for kind in kinds]
    status, output, record = suite(stages)
    assert status == 1
    assert {name: entry["state"] for name, entry in record.items()} == {
        "hang": "stopped",
        "crash": "failed",
        "garbage": "failed",
        "silent": "failed",
        "good": "done",
    }
    assert "used all of its 0.015 minutes" in record["hang"]["reason"]
    assert "SIGSEGV" in record["crash"]["reason"]
    assert "an illegal memory access" in record["crash"]["reason"]
    assert "garbage.json must have JSON objects" in record["garbage"]["reason"]
    assert "FileNotFoundError" in record["silent"]["reason"]
    failed = output.partition("Failed or skipped:")[2]
    assert all(f"  {kind}: " in failed for kind in kinds[:-1]) and "  good: " not in failed
    assert "Continue" not in failed and "--stages=hang,crash,garbage,silent" in failed
    started = {name: len(entry["calls"]) for name, entry in record.items()}
    again = suite(stages, names=["crash"])[2]  # only what is named runs again
    counts = {name: len(entry["calls"]) for name, entry in again.items()}
    assert counts == started | {"crash": 2}


def test_slices_continue_where_the_last_one_stopped_and_repeat_nothing(suite):
    stages = [fake("good"), fake("slow")]
    rows, calls = [], 0
    for _ in range(6):
        _, output, record = suite(stages, minutes=0.016)
        result = suite.out / "slow.json"
        before, rows = rows, json.loads(result.read_text())["rows"] if result.exists() else []
        assert rows[: len(before)] == before
        calls += 1
        if record["slow"]["state"] == "done":
            break
        assert record["slow"]["state"] in ("unfinished", "waiting")
        assert "Continue: python -m jaxtrain.bench --suite=first-day --minutes=0.016" in output
    assert len(rows) == 4 and calls > 1
    assert len(record["good"]["calls"]) == 1
    assert "Left:\n  nothing" in output


def test_the_plan_of_the_minutes_comes_first_and_fits_the_slice(suite):
    _, output, _ = suite([fake("good", 0.2), fake("slow", 2.0)], minutes=0.5)
    plan = output.partition("its output goes")[0].splitlines()
    assert [line.split() for line in plan[2:4]] == [
        ["good", "waiting", "0.0", "0.2", "0.2"],
        ["slow", "waiting", "0.0", "2", "0.3"],
    ]


def test_stages_run_in_the_order_in_which_they_are_named_with_their_limits(suite):
    stages = [fake("good"), fake("slow"), fake("wrong")]
    # The slow stage stores what it has in 0.016 minutes, and its whole time is one minute.
    names = ["wrong", "slow:0.016", "good"]
    _, output, record = suite(stages, minutes=3.0, names=names)
    plan, _, log = output.partition("its output goes")
    assert [line.split()[0] for line in plan.splitlines()[2:5]] == ["wrong", "slow", "good"]
    assert plan.splitlines()[3].split()[3:] == ["1", "0.0"]
    done = [line.partition(":")[0] for line in log.splitlines() if " after " in line]
    assert done == ["wrong", "slow", "good"]
    assert record["slow"]["state"] == "unfinished" and "its time in this call" in output
    assert "--stages=slow:0.016" in output.partition("Continue: ")[2].splitlines()[0]


def test_a_stage_is_not_started_before_its_input_exists(suite):
    stages = [fake("good"), fake("slow", reads="good.json")]
    status, output, record = suite(stages, names=["slow", "good"])
    assert status == 0 and record["slow"]["state"] == "waiting" and not record["slow"]["calls"]
    assert "--stages=slow" in output.partition("Continue: ")[2]  # now it can run
    assert suite(stages)[2]["slow"]["state"] == "done"


@pytest.mark.parametrize(
    "word, error",
    [
        ("kernel", "must be of machine, tests, .*; got kernel"),
        ("tests,tests:2", "each at most once; got tests"),
        ("tests:0.5", "tests:MINUTES must be at least 1; got tests:0.5"),
        ("tests:", "at least 1; got tests:"),
        ("tests:two", "at least 1; got tests:two"),
    ],
)
def test_stages_that_cannot_run_as_named_are_an_error(word, error):
    with pytest.raises(first_day_results.FirstDayError, match=error):
        choose_stages(word.split(","))


def test_a_named_stage_has_its_limit_and_all_stages_have_none():
    assert choose_stages([]) == list(STAGES)
    training, kernels = choose_stages(["training:6", "kernels"])
    assert (training.call_minutes, training.minutes, training.flag) == (6.0, 30, "training:6")
    assert kernels.call_minutes > kernels.minutes and kernels.flag == "kernels"


def test_a_kernel_that_is_wrong_is_listed_with_its_reason(suite):
    status, output, record = suite([fake("wrong")])
    assert status == 1 and record["wrong"]["state"] == "done"
    assert "wrong: attention, triton: wrong: off by 0.3" in output
    assert "norm" not in output.partition("Failed")[2]
    rows = first_day_results.read_rows(suite.out / "wrong.json")
    lines = first_day_results.summarize("kernels", rows)
    finished = ["attention: no correct kernel was timed", "norm: triton 1 us"]
    assert lines == [*finished, "head: not finished"]


def test_a_suite_that_is_killed_has_recorded_the_stage_that_was_running(suite, monkeypatch):
    records = []

    def interrupted(argv, output, limit_s, env):
        records.append((suite.out / first_day.RECORD).read_text())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(first_day, "run_process_group", interrupted)
        suite([fake("good", 3.0)])
    [recorded] = records
    entry = json.loads(recorded)["stages"]["good"]
    assert entry["state"] == "unfinished" and entry["used_s"] == pytest.approx(60, abs=1)
    entry = json.loads((suite.out / first_day.RECORD).read_text())["stages"]["good"]
    assert entry["reason"] == "interrupted" and entry["used_s"] < 5  # it could be recorded
    (suite.out / first_day.RECORD).write_text(recorded)
    assert suite([fake("good", 0.9)])[2]["good"]["state"] == "stopped"  # its minutes are used up
    (suite.out / first_day.RECORD).write_text(recorded)
    assert suite([fake("good", 3.0)])[2]["good"]["state"] == "done"


def test_a_trial_and_a_measurement_never_share_a_folder(tmp_path):
    day = first_day.FirstDay(tmp_path, 1.0, True, print)
    day._save()
    with pytest.raises(first_day.FirstDayError, match="is a trial, which --tiny continues"):
        first_day.FirstDay(tmp_path, 1.0, False, print)
    path = tmp_path / first_day.RECORD
    path.write_text(json.dumps(day.record | {"tiny": False, "card": "NVIDIA A40"}))
    with pytest.raises(first_day.FirstDayError, match="is no trial"):
        first_day.FirstDay(tmp_path, 1.0, True, print)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tiny": true, "card": "", "stages": 1}'])
def test_a_damaged_record_is_an_error_that_names_it(text, tmp_path):
    (tmp_path / first_day.RECORD).write_text(text)
    for flags in (["--tiny"], ["--write"]):
        with pytest.raises(SystemExit, match="error: --.*first_day.json"):
            bench.main(["--suite=first-day", f"--out={tmp_path}", *flags])


def test_results_of_another_card_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(first_day, "has_gpu", lambda: True)
    monkeypatch.setattr(first_day, "gpu_clocks", lambda: "NVIDIA A40, 535.1, 1740 MHz")
    first_day.FirstDay(tmp_path, 1.0, False, print)._save()
    monkeypatch.setattr(first_day, "gpu_clocks", lambda: "NVIDIA H100, 535.1, 1980 MHz")
    with pytest.raises(first_day.FirstDayError, match="this card, NVIDIA H100; got .*NVIDIA A40"):
        first_day.FirstDay(tmp_path, 1.0, False, print)


def test_two_calls_cannot_use_one_folder(tmp_path):
    with (
        first_day_results.lock_folder(tmp_path),
        pytest.raises(first_day.FirstDayError, match="in use"),
    ):
        with first_day_results.lock_folder(tmp_path):
            pass


def test_every_line_and_row_of_a_trial_says_that_it_is_one(suite, monkeypatch, capsys):
    run = functools.partial(first_day.run_suite, stages=[fake("good"), fake("wrong")])
    monkeypatch.setattr(first_day, "run_suite", run)
    with pytest.raises(SystemExit, match="1"):  # a kernel is wrong
        bench.main(["--suite=first-day", "--tiny", "--minutes=1", f"--out={suite.out}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and all(line.startswith("trial: ") for line in lines)
    record = json.loads((suite.out / first_day.RECORD).read_text())
    results = [first_day_results.read_rows(suite.out / f"{name}.json") for name in record["stages"]]
    assert record["tiny"] and all(row["tiny"] for rows in results for row in rows)
    calls = [call for entry in record["stages"].values() for call in entry["calls"]]
    assert len(calls) == 2
    for call in calls:
        assert call["tiny"] and call["command"][0] == sys.executable
        assert call["date"] and call["commit"] and call["seconds"] > 0


def test_wrong_flags_of_the_suite_are_errors(tmp_path, capsys):
    for flags in ("--suite=first-day", "--suite=cpu --out=x", "--suite=cpu --resume"):
        with pytest.raises(SystemExit):
            bench.parse(flags.split())
    assert capsys.readouterr().err.count("needs --") == 3
    common = ["--suite=first-day", f"--out={tmp_path}"]
    with pytest.raises(SystemExit, match="error: --stages must be of machine, tests"):
        bench.main([*common, "--tiny", "--stages=kernel"])
    with pytest.raises(SystemExit, match="first-day needs a GPU; got none"):
        bench.main(common)


def test_the_stages_commands_are_those_of_modules_that_exist(tmp_path):
    for stage in STAGES:
        for tiny in (False, True):
            argv = build_argv(stage, tmp_path, 5.0, tiny and stage.tiny is not None)
            assert importlib.util.find_spec(argv[argv.index("-m") + 1]) and not [
                word for word in argv if "{" in word
            ]
            assert any(str(tmp_path) in word for word in argv)
    training = build_argv(STAGES[[s.name for s in STAGES].index("training")], tmp_path, 5.0, False)
    args = bench.parse(training[3:])
    assert args.resume and args.minutes == 5.0 and args.json == f"{tmp_path}/training.jsonl"


STEP = {"step_s": 0.5, "optimizer_s": 0.05, "optimizer_range_s": [0.04, 0.06], "host_s": 0.01}
STEP |= {"tokens_per_step": 1_024, "tokens_per_s": 2_048.0, "step_p95_s": 0.5, "peak_bytes": None}


def test_the_gpu_suite_continues_with_the_rows_that_were_not_finished(tmp_path, monkeypatch):
    """The first call's time ends in PyTorch's row; our row fails; the second call has all day."""
    started, path = [], tmp_path / "rows.jsonl"

    def run_child(module, job, folder, limit_s, env):
        started.append((module, job.kind))
        if job.kind == "about":
            return {"device": "cpu", "matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e10}
        if module == "torch_child" and len(started) < 4:
            return {"error": "killed", "timed_out": True}
        return {"error": "exit status 1"} if module == "jax_child" else STEP

    monkeypatch.setattr(gpu_training, "run_child", run_child)
    monkeypatch.setattr(suites, "_require_torch", lambda variants_without: None)
    argv = "--suite=gpu --tiny --resume --minutes=2 --sizes=gpt_124m --optimizers=adamw".split()
    bench.main([*argv, f"--json={path}"])
    # No warm start: our step has failed, so that nothing is in the compile cache.
    assert [module for module, _ in started] == ["jax_child", "jax_child", "torch_child"]
    rows = first_day_results.read_rows(path)
    assert first_day_results.find_left(rows) == ["gpt_124m adamw pytorch step"]
    assert not any(row.get("timed_out") for row in rows)
    bench.main([*argv, f"--json={path}"])
    assert started[3:] == [("torch_child", "train")]
    names = [first_day_results.row_name(row) for row in first_day_results.read_rows(path)]
    cases = [f"gpt_124m adamw {ending}" for ending in ("jaxtrain step", "jaxtrain warm start")]
    assert [name for name in names if name] == ["ceilings", *cases, "gpt_124m adamw pytorch step"]
    with pytest.raises(SystemExit, match="is a trial, which a measurement cannot continue"):
        monkeypatch.setattr(gpu_training, "has_gpu", lambda: True)
        bench.main([word for word in argv if word != "--tiny"] + [f"--json={path}"])

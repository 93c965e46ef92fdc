"""The children of the suites for GPUs: how they end, and how their results are read."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxtrain.benchmarks import child, jax_child
from jaxtrain.benchmarks.child import BenchJob, child_main, run_child, run_process_group


def test_a_child_that_crashes_or_takes_too_long_is_a_row_with_the_reason(tmp_path):
    crashed = run_child("jax_child", BenchJob("train", "gpt_124m"), tmp_path, 60)
    assert "exit status 1" in crashed["error"]
    assert "JAX runs on cpu, so its figures would be another device's" in crashed["error"]
    assert "more than the 0 s" in run_child("jax_child", BenchJob("about"), tmp_path, 0.1)["error"]


PROGRAM = """
import sys
from pathlib import Path
kind, path = sys.argv[1], Path(sys.argv[3])
if kind == "half":
    path.write_text("{")
if kind == "list":
    path.write_text("[]")
if kind == "chatty":
    print("x" * 10_000_000, "the last line", sep="\\n", flush=True)
    sys.exit(7)
"""


@pytest.mark.parametrize(
    "kind, error",
    [
        ("silent", "no result: .*No such file or directory.*result.json"),
        ("half", "no result: .*result.json must have a JSON object; got Expecting"),
        ("list", "no result: .*result.json must have a JSON object; got \\[\\]"),
        ("chatty", "exit status 7: x.* | the last line"),
    ],
)
def test_a_child_whose_result_cannot_be_read_is_a_row_with_the_reason(
    kind, error, tmp_path, monkeypatch
):
    (tmp_path / "program.py").write_text(PROGRAM)
    program = [sys.executable, str(tmp_path / "program.py"), kind]
    start = lambda argv, *args: run_process_group([*program, *argv[-2:]], *args)
    monkeypatch.setattr(child, "run_process_group", start)
    result = run_child("jax_child", BenchJob("about"), tmp_path, 60)
    assert list(result) == ["error"] and len(result["error"]) < 700
    assert re.search(error, result["error"])


@pytest.mark.parametrize(
    "status, reason", [(None, "killed: .* more than the 60 s"), (7, "status 7: ")]
)
def test_what_a_child_has_stored_is_returned_with_the_reason_why_it_ended(
    status, reason, tmp_path, monkeypatch
):
    def start(argv, *args):
        Path(argv[-1]).write_text('{"step_s": 1.5}')
        return status

    monkeypatch.setattr(child, "run_process_group", start)
    result = run_child("jax_child", BenchJob("train"), tmp_path, 60)
    assert result.pop("step_s") == 1.5 and list(result) == ["incomplete"]
    assert re.search(reason, result["incomplete"])


@pytest.mark.parametrize("stored", [[], [{"step_s": 1.5}]])
def test_running_out_of_memory_replaces_no_result(stored, tmp_path, monkeypatch):
    def measure(job):
        yield from stored
        raise MemoryError("out of memory\nand more")

    paths = [tmp_path / "job.json", tmp_path / "result.json"]
    paths[0].write_text(json.dumps(dataclasses.asdict(BenchJob("train"))))
    monkeypatch.setattr(sys, "argv", ["", *map(str, paths)])
    is_oom = lambda error: isinstance(error, MemoryError)
    with pytest.raises(MemoryError) if stored else contextlib.nullcontext():
        child_main({"train": measure}, is_oom)
    assert json.loads(paths[1].read_text()) == (stored or [{"oom": "out of memory"}])[-1]


def test_our_step_is_stored_before_its_trace_and_the_optimizer_which_may_fail(
    monkeypatch, tmp_path
):
    def fail(*args):
        raise MemoryError("no memory for the copy of the gradients")

    step = SimpleNamespace(compiled=None, compile_s=2.0)
    jax_step = SimpleNamespace(step=step, init=dict, launch=fail, run=SimpleNamespace(routes={}))
    jax_step.state = ()
    monkeypatch.setattr(jax_child, "JaxStep", lambda *args: jax_step)
    monkeypatch.setattr(jax_child, "start_runtime", lambda cfg: None)
    monkeypatch.setattr(jax_child, "peak_bytes", lambda compiled: 1)
    monkeypatch.setattr(jax_child, "time_steps", lambda *args: {"step_s": 1.5})
    monkeypatch.setattr(jax_child, "time_optimizer", fail)
    job = BenchJob("train", "gpt_124m", batch=2, rows=2, tiny=True, trace=str(tmp_path / "trace"))
    results = jax_child.train(job)
    assert "no_trace" not in (first := next(results)) and first["step_s"] == 1.5
    assert next(results)["no_trace"] == "MemoryError: no memory for the copy of the gradients"
    with pytest.raises(MemoryError):
        next(results)


@pytest.mark.parametrize("script, status", [("", 0), ("time.sleep(60)", None)])
@pytest.mark.parametrize("own_session", [False, True])
def test_processes_that_a_child_started_are_killed_with_it(tmp_path, script, status, own_session):
    path = tmp_path / "output"
    start = f"start_new_session={own_session}).pid, flush=True);"
    start = f"import subprocess, time; print(subprocess.Popen(['sleep', '60'], {start}"
    argv = [sys.executable, "-S", "-c", start + script]  # -S: starts sooner
    with open(path, "w") as output:
        assert run_process_group(argv, output, 1.0, None) == status
    pid, until = int(path.read_text()), time.monotonic() + 5
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid) -> bool:
    """Returns whether a process exists and is not a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_parent_that_is_interrupted_ends_its_child(number, tmp_path):
    path = tmp_path / "output"
    with open(path, "w") as output, pytest.raises((KeyboardInterrupt, SystemExit)):
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        run_process_group(["sh", "-c", "echo $$; exec sleep 60"], output, 5.0, None)
    assert not is_running(int(path.read_text()))

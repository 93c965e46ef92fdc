"""The children of the suites for GPUs: how they end, and how their results are read."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxtrain.benchmarks import child
from jaxtrain.benchmarks.child import BenchJob, run_child, run_process_group


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

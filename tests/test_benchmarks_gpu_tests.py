"""Stage tests of suite first-day: how it goes on after tests that end their process."""

import json
from pathlib import Path

import pytest

from jaxtrain import bench
from jaxtrain.benchmarks import first_day_results, gpu_tests

TESTS = """
import time
BROKEN = []
def test_fails(): assert 1 == 2
def test_breaks_its_process():
    BROKEN.append(True)
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal access")
def test_passes(): assert not BROKEN
def test_hangs(): time.sleep(60)
"""


@pytest.mark.long
def test_a_test_that_hangs_or_breaks_cuda_costs_no_other_test_its_outcome(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("")
    (tmp_path / "tests" / "test_x.py").write_text(TESTS)
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setitem(gpu_tests.SELECTED, True, ("tests",))
    monkeypatch.setenv("PYTHONPATH", str(Path(bench.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "tests.jsonl"
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr("sys.stdout", log)
        assert gpu_tests.main(["--tiny", f"--out={out}", "--test-seconds=2"]) == 0
    rows = first_day_results.read_rows(out)
    assert [row["test"].partition("::")[2] for row in rows] == [
        "test_fails",
        "test_breaks_its_process",
        "test_passes",
        "test_hangs",
    ]
    assert [row["outcome"] for row in rows] == ["failed", "failed", "passed", "failed"]
    assert all(row["tiny"] for row in rows)
    errors = [row["error"] for row in rows if "error" in row]
    texts = ("assert 1 == 2", "CUDA_ERROR_ILLEGAL_ADDRESS", "it did not end within 2 s")
    assert all(text in error for text, error in zip(texts, errors, strict=True))
    output = (tmp_path / "log").read_text()  # it has their tracebacks
    assert "in test_hangs" in output and "def test_breaks_its_process" in output
    assert len(first_day_results.find_problems(rows)) == 3


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that runs the stage with fake processes: (exit status, its rows).

    A process is its exit status and the tests that it runs: an outcome for each that ends.
    """
    out = tmp_path / "tests.jsonl"

    def run_stage(*processes):
        left = list(processes)

        def run_process_group(command, output, limit_s, env):
            status, tests = left.pop(0)
            with open(out, "a") as file:
                for name, outcome in tests.items():
                    ended = {"test": name, "outcome": outcome}
                    for row in [{"test": name}, *([ended] if outcome else [])]:
                        file.write(json.dumps(row) + "\n")
            return status

        monkeypatch.setattr(gpu_tests, "run_process_group", run_process_group)
        monkeypatch.chdir(tmp_path)  # which the stage changes
        status = gpu_tests.main(["--tiny", f"--out={out}"])
        assert not left
        return status, first_day_results.read_rows(out) if out.exists() else []

    return run_stage


CRASH = -11


def outcomes(rows):
    return {row["test"]: row.get("outcome", "left") for row in rows}


def test_a_test_that_crashes_runs_again_after_the_others_and_fails_if_it_crashes_again(run):
    crash = (CRASH, {"a": "passed", "b": ""})
    status, rows = run(crash, (CRASH, {"c": "passed", "b": ""}), (5, {}))
    assert status == 0 and outcomes(rows) == {"a": "passed", "b": "failed", "c": "passed"}
    assert rows[1]["error"] == "it ended its process twice: exit status -11"


def test_a_test_that_crashed_because_of_an_earlier_one_can_still_pass(run):
    status, rows = run((CRASH, {"a": "passed", "b": ""}), (0, {"b": "passed"}))
    assert status == 0 and outcomes(rows) == {"a": "passed", "b": "passed"}


def test_a_process_that_crashes_between_two_tests_is_followed_by_another(run):
    status, rows = run((CRASH, {"a": "passed"}), (0, {"b": "passed"}))
    assert status == 0 and outcomes(rows) == {"a": "passed", "b": "passed"}


def test_a_test_that_was_running_when_the_time_was_up_is_left_and_has_not_failed(run):
    assert outcomes(run((None, {"a": "passed", "b": ""}))[1]) == {"a": "passed", "b": "left"}
    status, rows = run((None, {"b": ""}))
    assert status == 0 and outcomes(rows)["b"] == "left"
    assert first_day_results.find_left(rows) == ["b"]


def test_pytest_that_ends_before_any_test_is_an_error(run):
    assert run((2, {})) == (1, [])


def test_tests_are_skipped_with_a_reason_where_the_checkout_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    assert gpu_tests.main([f"--out={tmp_path}/tests.jsonl"]) == 0
    [row] = first_day_results.read_rows(tmp_path / "tests.jsonl")
    assert "no tests beside" in row["skipped"]

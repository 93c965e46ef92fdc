import json
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.metrics.jsonl import read_metrics
from jaxtrain.reporting.run_logger import RunLogger

METRICS = {"train/loss_nats": 2.413, "perf/tokens_per_s": 6842.0, "perf/step_time_s": 0.299}
EVAL = {"eval/loss_nats": 1.702, "eval/bits_per_byte": 2.456}

PROGRAM = """
import os, signal, sys
from jaxtrain.reporting.run_logger import RunLogger
workdir, steps, resume_step, stop = sys.argv[1], *map(int, sys.argv[2:5])
with RunLogger(workdir, steps, resume_step=resume_step) as report:
    report.print_header(["hello", ("model", "tiny"), ("parameters", "7")])
    for step in range(resume_step + 1, steps + 1):
        report.advance(step)
        if step % 2 == 0:
            report.write(step, {"train/loss_nats": 3 / step, "perf/step_time_s": 0.299,
                                "perf/tokens_per_s": 6842.0})
        if step == 4:
            report.write(step, {"eval/loss_nats": 1.702, "eval/bits_per_byte": 2.456})
        if step == stop:
            os.kill(os.getpid(), signal.SIGKILL)
    report.finish({"perf/steps": steps})
"""


def run_program(workdir, steps=8, resume_step=0, stop=0):
    numbers = map(str, (steps, resume_step, stop))
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(workdir), *numbers]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its output in a pipe: (folder, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_program(folder)


def losses(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    return [(r["step"], r.get("train/loss_nats"), r.get("eval/loss_nats")) for r in records]


def test_output_in_a_pipe_is_one_plain_line_for_each_logged_step(finished):
    _, done = finished
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[:3] == ["hello", "model       tiny", "parameters  7"]
    form = r"step \d/8  loss  \d\.\d{3}      6 842 tok/s     299 ms/step  eta \d:\d\d"
    assert len([line for line in lines if re.fullmatch(form, line)]) == 4
    assert "eval  step 4  loss 1.702 nats/token  2.456 bits/byte" in lines


def test_a_killed_and_resumed_run_logs_what_an_uninterrupted_one_does(finished, tmp_path):
    assert run_program(tmp_path, stop=6).returncode == -signal.SIGKILL
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "tim')
    resumed = run_program(tmp_path, resume_step=4)
    assert resumed.returncode == 0, resumed.stderr
    assert "removed 1 lines after step 4" in resumed.stdout
    assert losses(tmp_path) == losses(finished[0])


def test_the_summary_counts_steps_after_the_last_logged_one(tmp_path):
    with RunLogger(tmp_path, 200, quiet=True) as report:
        report.write(100, METRICS)
        report.advance(107)
        report.finish({"stopped_by": "SIGTERM"})
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 107


def test_an_exception_in_the_loop_passes_through_and_the_curve_is_drawn(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunLogger(tmp_path, 10, quiet=True) as report:
        report.write(1, METRICS)
        raise KeyboardInterrupt
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert losses(tmp_path) == [(1, 2.413, None)]


def test_an_error_while_drawing_does_not_hide_the_one_in_the_loop(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLogger(tmp_path, 10, quiet=True) as report:
        report.write(1, METRICS)
        (tmp_path / "metrics.jsonl").unlink()
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), RunLogger(tmp_path, 10, quiet=True) as report:
        report.write(1, METRICS)
        (tmp_path / "metrics.jsonl").unlink()


def test_a_run_stopped_before_its_first_loss_draws_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunLogger(tmp_path, 10, quiet=True):
        raise KeyboardInterrupt
    assert not (tmp_path / "loss_curve.png").exists()


def test_scalars_of_numpy_and_jax_are_written_as_numbers(tmp_path):
    with RunLogger(tmp_path, 10, quiet=True) as report:
        report.write(3, {"a": np.float32(0.1), "b": jnp.float32(1 / 3), "c": jnp.int32(7)})
    [record] = read_metrics(tmp_path / "metrics.jsonl")
    assert record["a"] == float(np.float32(0.1)) and record["b"] == float(np.float32(1 / 3))
    assert record["step"] == 3 and record["c"] == 7


@pytest.mark.parametrize("value", [np.zeros(2), "1.0", None])
def test_a_metric_that_is_not_one_number_is_refused_by_name(tmp_path, value):
    with RunLogger(tmp_path, 10, quiet=True) as report:
        with pytest.raises(ValueError, match="train/vector"):
            report.write(1, {"train/vector": value})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_summary_contains_the_newest_metrics_and_what_was_passed(tmp_path, capsys):
    total = {"perf/wall_s": 62.0, "perf/tokens": 409_600, "perf/goodput": 0.93}
    total |= {"perf/step_time_s": 0.299, "perf/step_time_p99_s": 0.4, "perf/tokens_per_s": 6842.0}
    with RunLogger(tmp_path, 200) as report:
        report.write(100, METRICS | EVAL)
        report.write(200, {"train/loss_nats": 1.5})
        report.finish(total | {"versions": {"jax": "1.2.3"}})
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = total | EVAL | {"step": 200, "steps": 200, "train/loss_nats": 1.5}
    assert summary == expected | {"versions": {"jax": "1.2.3"}}
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "done  step 200/200  loss 1.500 nats/token",
        "eval  loss 1.702 nats/token  2.456 bits/byte",
        "steps p50 299 ms  p99 400 ms  6 842 tok/s",
        "time  1:02 for 409 600 tokens, 93% of it in steps",
        f"curve {tmp_path / 'loss_curve.png'}",
    ]


def test_a_resumed_run_with_no_steps_left_still_summarises_its_losses(tmp_path):
    with RunLogger(tmp_path, 4, quiet=True) as report:
        report.write(4, METRICS | EVAL)
    with RunLogger(tmp_path, 4, resume_step=4, quiet=True) as report:
        report.finish({})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["train/loss_nats"] == 2.413 and summary["eval/loss_nats"] == 1.702


def use_every_method(report):
    report.print_header(["text"])
    report.write_config({"a": float("inf")})
    report.advance(1)
    report.write(1, METRICS | EVAL)
    report.note("text")
    report.finish({})


def test_an_inactive_logger_writes_and_prints_nothing(tmp_path, capsys):
    with RunLogger(tmp_path / "run", 10, active=False) as report:
        use_every_method(report)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_quiet_logger_writes_everything_and_prints_nothing(tmp_path, capsys):
    with RunLogger(tmp_path, 1, quiet=True) as report:
        use_every_method(report)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": "inf"}
    names = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert names == {"config", "events", "metrics", "summary", "loss_curve"}

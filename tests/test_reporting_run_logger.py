import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest

from jaxtrain.reporting import run_logger as report_module
from jaxtrain.reporting.progress_text import format_duration
from jaxtrain.reporting.run_logger import RunLogger, read_metrics

METRICS = {"train/loss_nats": 2.413, "perf/tokens_per_s": 6842.0, "perf/step_time_s": 0.299}
EVAL = {"eval/loss_nats": 1.702, "eval/bits_per_byte": 2.456}

RUN = """
import os, signal, sys, time
from jaxtrain.reporting.run_logger import RunLogger, set_up_logging
from absl import logging
set_up_logging()
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
            logging.warning("a log line")
        if step == stop:
            os.kill(os.getpid(), signal.SIGKILL)
    report.finish({"perf/steps": steps})
"""


def run_command(workdir, steps=8, resume_step=0, stop=0):
    return [
        sys.executable,
        "-W",
        "error",
        "-c",
        RUN,
        *map(str, (workdir, steps, resume_step, stop)),
    ]


def run(workdir, **kwargs):
    return subprocess.run(run_command(workdir, **kwargs), capture_output=True, text=True)


def run_on_a_terminal(workdir, columns):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(run_command(workdir), stdout=theirs, stderr=theirs)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunks.append(os.read(ours, 65_536))
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    return b"".join(chunks).decode()


def losses(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    return [(r["step"], r.get("train/loss_nats"), r.get("eval/loss_nats")) for r in records]


def test_a_log_gets_one_plain_line_a_logged_step(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[:3] == ["hello", "model       tiny", "parameters  7"]
    form = r"step \d/8  loss  \d\.\d{3}      6 842 tok/s     299 ms/step  eta \d:\d\d"
    assert len([line for line in lines if re.fullmatch(form, line)]) == 4
    assert "eval  step 4  loss 1.702 nats/token  2.456 bits/byte" in lines
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING <string>: a log line\n", done.stderr)


@pytest.mark.parametrize("columns", [100, 0])  # 0: a terminal that does not know its width
def test_a_terminal_gets_a_bar_that_other_lines_do_not_break(tmp_path, columns):
    shown = run_on_a_terminal(tmp_path, columns)
    assert re.search(r"\rstep 8/8 .*100 %  loss  0.375 +6 842 tok/s +299 ms/step", shown)
    assert not re.search(r"(?m)^step \d/8  loss", shown)
    assert re.search(r"\r *\reval  step 4  loss 1.702 nats/token  2.456 bits/byte\r\n", shown)
    assert re.search(r"\r *\r\d\d:\d\d:\d\d WARNING <string>: a log line\r\n", shown)


def test_on_60_columns_no_figure_of_the_bar_is_cut(tmp_path):
    shown = run_on_a_terminal(tmp_path, 60)
    bars = [
        line for line in re.split(r"[\r\n]+", shown) if line.startswith("step") and "loss" in line
    ]
    assert len(bars) >= 4 and all(len(line) <= 60 for line in bars)
    assert all(re.search(r"loss  \d\.\d{3}  6 842 tok/s  eta 0:0\d$", line) for line in bars)
    assert "\x1b[3" not in shown  # a colour


def test_a_run_that_stops_between_two_logged_steps_counts_all_of_them(tmp_path):
    with RunLogger(tmp_path, 200, quiet=True) as report:
        report.write(100, METRICS)
        report.advance(107)
        report.finish({"stopped_by": "SIGTERM"})
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 107


def test_a_killed_and_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    assert run(tmp_path / "whole").returncode == 0
    assert run(tmp_path / "resumed", stop=6).returncode == -signal.SIGKILL
    with open(tmp_path / "resumed" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "tim')
    resumed = run(tmp_path / "resumed", resume_step=4)
    assert resumed.returncode == 0, resumed.stderr
    assert "removed 1 lines after step 4" in resumed.stdout
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


def test_columns_stay_in_place_whatever_the_numbers(tmp_path, capsys):
    rows = [(10.8, 123.0, 0.0004), (1.5, 1_234_567.0, 12.5), (float("nan"), 6842.0, 0.299)]
    with RunLogger(tmp_path, 10_000) as report:
        for i, (loss, speed, step_s) in enumerate(rows):
            names = ("train/loss_nats", "perf/tokens_per_s", "perf/step_time_s")
            report.write(10**i, dict(zip(names, (loss, speed, step_s), strict=True)))
    lines = capsys.readouterr().out.splitlines()[: len(rows)]
    for mark in ("/10000  loss", " tok/s", " ms/step  eta "):
        assert len({line.index(mark) for line in lines}) == 1


def test_the_time_left_is_the_steps_left_at_the_pace_so_far(tmp_path, capsys):
    with RunLogger(tmp_path, 200) as report:
        report.write(20, METRICS)
    assert capsys.readouterr().out.splitlines()[0].endswith("eta 0:54")  # 180 x 299 ms


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (54, "0:54"), (3_723, "1:02:03"), (180_123, "2d 02:02:03")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


def test_an_exception_passes_and_the_curve_is_drawn(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunLogger(tmp_path, 10, quiet=True) as report:
        report.write(1, METRICS)
        raise KeyboardInterrupt
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert losses(tmp_path) == [(1, 2.413, None)]


def test_an_error_in_the_drawing_does_not_hide_the_one_in_the_loop(tmp_path):
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


def test_the_summary_holds_the_newest_figures_and_what_was_passed(tmp_path, capsys):
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


def test_a_run_that_has_nothing_left_to_do_still_knows_its_loss(tmp_path):
    with RunLogger(tmp_path, 4, quiet=True) as report:
        report.write(4, METRICS | EVAL)
    with RunLogger(tmp_path, 4, resume_step=4, quiet=True) as report:
        report.finish({})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["train/loss_nats"] == 2.413 and summary["eval/loss_nats"] == 1.702


def test_an_inactive_report_writes_and_prints_nothing(tmp_path, capsys):
    with RunLogger(tmp_path / "run", 10, active=False) as report:
        report.print_header(["text"])
        report.write_config({"a": 1})
        report.advance(1)
        report.write(1, METRICS | EVAL)
        report.note("text")
        report.finish({})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_quiet_report_writes_all_and_prints_nothing(tmp_path, capsys):
    with RunLogger(tmp_path, 1, quiet=True) as report:
        report.print_header(["text"])
        report.write_config({"a": float("inf")})
        report.write(1, METRICS | EVAL)
        report.finish({})
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": "inf"}
    names = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert names == {"config", "events", "metrics", "summary", "loss_curve"}


LOGGING = """
import logging as std_logging, runpy, sys
from absl import app, logging
from jaxtrain.reporting.run_logger import set_up_logging
def main(argv):
    set_up_logging(int(argv[1]))
    exec(compile("logging.info('ours')\\nlogging.warning('our warning')", argv[2], "exec"))
    logging.info("theirs")
    std_logging.getLogger("jax._src.xla_bridge").info("their module")
    logging.warning("their warning")
app.run(main)
"""


@pytest.mark.parametrize(
    "argv, shown",
    [
        (["0"], ["ours", "our warning", "their warning"]),
        (["3"], ["our warning", "their warning"]),
        (["3", "-v=0"], ["ours", "our warning", "theirs", "their module", "their warning"]),
        (["0", "-v=-2"], []),
    ],
)
def test_logs_are_ours_on_process_0_and_warnings_of_all(argv, shown):
    command = [sys.executable, "-c", LOGGING, argv[0], report_module.__file__, *argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == shown
    process = "" if argv[0] == "0" else " process 3"
    form = rf"\d\d:\d\d:\d\d{process} (INFO|WARNING) \S+: .*"
    assert all(re.fullmatch(form, line) for line in lines)

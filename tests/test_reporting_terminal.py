import fcntl
import json
import logging as std_logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from absl import logging

from jaxtrain.reporting import terminal as terminal_module
from jaxtrain.reporting.terminal import (
    Terminal,
    closing_lines,
    format_duration,
    format_seconds,
    score_texts,
    set_up_logging,
    step_text,
)

METRICS = {"train/loss_nats": 2.413, "perf/tokens_per_s": 6842.0, "perf/step_time_s": 0.299}
SUMMARY = {"step": 200, "steps": 200, "train/loss_nats": 1.5, "eval/loss_nats": 1.7}


@pytest.fixture
def root_logger():
    """Restores the handlers and the level of the root logger."""
    root = std_logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def shown_on_a_terminal(columns, monkeypatch):
    """Returns what a run of 8 steps prints on a terminal of the given width."""
    controller, tty = pty.openpty()
    fcntl.ioctl(tty, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(tty, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        set_up_logging()
        terminal = Terminal(8)
        for step in range(1, 9):
            terminal.advance(step)
            if step % 2 == 0:
                terminal.show_step(step, METRICS | {"train/loss_nats": 3 / step})
            if step == 4:
                terminal.print("a printed line")
                logging.warning("a log line")
        terminal.close()
    chunks = []
    while True:
        try:
            chunks.append(os.read(controller, 65_536))
        except OSError:  # Linux reports the closed other end as an error
            break
    os.close(controller)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("columns", [100, 0])  # 0: a terminal of unknown width
def test_a_terminal_shows_a_bar_that_other_lines_do_not_break(columns, monkeypatch, root_logger):
    shown = shown_on_a_terminal(columns, monkeypatch)
    assert re.search(r"\rstep 8/8 .*100 %  loss  0.375 +6 842 tok/s +299 ms/step", shown)
    assert not re.search(r"(?m)^step \d/8  loss", shown)
    assert re.search(r"\r *\ra printed line\r\n", shown)
    assert re.search(r"\r *\r\d\d:\d\d:\d\d WARNING \w+: a log line\r\n", shown)


def test_a_bar_on_60_columns_shows_fewer_numbers_and_cuts_none(monkeypatch, root_logger):
    shown = shown_on_a_terminal(60, monkeypatch)
    bars = [
        line for line in re.split(r"[\r\n]+", shown) if line.startswith("step") and "loss" in line
    ]
    assert len(bars) >= 4 and all(len(line) <= 60 for line in bars)
    assert all(re.search(r"loss  \d\.\d{3}  6 842 tok/s  eta 0:0\d$", line) for line in bars)
    assert "\x1b[3" not in shown  # no colours


def test_progress_lines_are_aligned_for_numbers_of_any_size(capsys):
    terminal = Terminal(10_000)
    rows = [(10.8, 123.0, 0.0004), (1.5, 1_234_567.0, 12.5), (float("nan"), 6842.0, 0.299)]
    for i, values in enumerate(rows):
        terminal.show_step(10**i, dict(zip(METRICS, values, strict=True)))
    lines = capsys.readouterr().out.splitlines()
    for mark in ("/10000  loss", " tok/s", " ms/step  eta "):
        assert len({line.index(mark) for line in lines}) == 1


def test_the_time_left_is_the_remaining_steps_at_the_pace_so_far(capsys):
    Terminal(200).show_step(20, METRICS)
    assert capsys.readouterr().out.splitlines()[0].endswith("eta 0:54")  # 180 x 299 ms


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (None, "loss  2.413      6 842 tok/s     299 ms/step  eta 0:54"),
        (55, "loss  2.413      6 842 tok/s     299 ms/step  eta 0:54"),
        (40, "loss  2.413  6 842 tok/s  eta 0:54"),
        (25, "loss  2.413  eta 0:54"),
        (5, "loss  2.413  eta 0:54"),
    ],
)
def test_a_step_text_leaves_out_what_does_not_fit(columns, text):
    assert step_text(METRICS, 54, columns) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00867, "8.67 ms"),
        (0.0583, "58.3 ms"),
        (0.09996, "100 ms"),
        (0.299, "299 ms"),
        (1.2, "1.20 s"),
        (481.2, "481 s"),
        (0.0, "0 ms"),
    ],
)
def test_step_times_have_three_digits(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (54, "0:54"), (3_723, "1:02:03"), (180_123, "2d 02:02:03")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


def test_scores_of_tasks_and_of_held_out_texts_are_one_line_each_without_what_is_unknown():
    arc = {"accuracy": 0.2713, "accuracy_stderr": 0.0191, "accuracy_norm": 0.295, "examples": 1570}
    metrics = {"eval/loss_nats": 1.7, "eval/accuracy_norm_loss_nats": 2.0}
    metrics |= {f"eval/arc_easy_{name}": value for name, value in arc.items()}
    metrics |= {"eval/words_accuracy": 1.0, "eval/words_examples": 1}
    metrics |= {"eval/wiki_loss_nats": 1.0, "eval/wiki_bits_per_byte": 1.2344}
    assert score_texts(metrics) == {
        "held-out": "accuracy_norm 2.000 nats/token  wiki 1.234 bits/byte",
        "tasks": "arc_easy 27.1 ± 1.9 % (norm 29.5) of 1,570  words 100.0 % of 1",
    }
    assert score_texts({"eval/loss_nats": 1.7, "eval/bits_per_byte": 2.4}) == {}


def test_the_evaluated_weights_are_named_only_if_they_are_not_the_parameters():
    plain = closing_lines(SUMMARY | {"eval_at": "the parameters"})
    assert plain[1] == "eval  loss 1.700 nats/token"
    averaged = closing_lines(SUMMARY | {"eval_at": "the averaged weights"})
    assert averaged[1] == "eval  loss 1.700 nats/token  at the averaged weights"


def test_a_run_that_a_signal_stopped_after_its_last_step_is_not_done():
    assert closing_lines(SUMMARY)[0].startswith("done  step 200/200")
    assert closing_lines(SUMMARY | {"stopped_by": "SIGTERM"})[0].startswith("stopped step 200/200")


# Each case: process index, flags, the lines that are shown of five that are logged.
LOG_CASES = [
    (0, [], ["own", "own warning", "other warning"]),
    (3, [], ["own warning", "other warning"]),
    (3, ["-v=0"], ["own", "own warning", "other", "module", "other warning"]),
    (0, ["-v=-2"], []),
]
LOGGING = """
import json, logging as std_logging, sys
from absl import flags, logging
from jaxtrain.reporting.terminal import set_up_logging
own_file, cases = sys.argv[1], json.loads(sys.argv[2])
for process_index, argv in cases:
    flags.FLAGS["verbosity"].unparse()
    flags.FLAGS(["program", *argv])
    set_up_logging(process_index)
    print("---", file=sys.stderr)
    exec(compile("logging.info('own')\\nlogging.warning('own warning')", own_file, "exec"))
    logging.info("other")
    std_logging.getLogger("jax._src.xla_bridge").info("module")
    logging.warning("other warning")
"""


def test_logs_show_own_lines_on_process_0_and_warnings_everywhere():
    cases = [(process_index, argv) for process_index, argv, _ in LOG_CASES]
    command = [sys.executable, "-c", LOGGING, terminal_module.__file__, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = done.stderr.split("---\n")[1:]
    for output, (process_index, _, expected) in zip(outputs, LOG_CASES, strict=True):
        lines = output.splitlines()
        assert [line.split(": ", 1)[1] for line in lines] == expected
        process = f" process {process_index}" if process_index else ""
        form = rf"\d\d:\d\d:\d\d{process} (INFO|WARNING) \S+: .*"
        assert all(re.fullmatch(form, line) for line in lines)

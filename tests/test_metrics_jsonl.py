import json
import math

import pytest

from jaxtrain.metrics.jsonl import MetricsFile, read_metrics

LOSS = "train/loss_nats"


def loss_at(step):
    return 1 / 3 + math.exp(-step / 7)


def log_steps(workdir, steps, resume_step=0):
    log = MetricsFile(workdir, resume_step)
    for step in steps:
        log.write(step, 0.0, {LOSS: loss_at(step)})
    log.close()
    return log


def steps_and_losses(workdir):
    return [(r["step"], r[LOSS]) for r in read_metrics(workdir / "metrics.jsonl")]


def test_numbers_are_read_back_bit_for_bit(tmp_path):
    log = MetricsFile(tmp_path)
    values = {"a": 0.1, "b": 5e-324, "c": -math.inf, "d": 2**60}
    log.write(3, 1.5, values)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "time": 1.5} | values]


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
    log = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        log.write(step, 0.0, {LOSS: loss_at(step)})
        assert steps_and_losses(tmp_path)[-1] == (step, loss_at(step))
    log.close()


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_last_line_that_is_cut_off_is_skipped_and_replaced_on_resume(tmp_path, cut):
    log_steps(tmp_path, range(1, 11))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    last = 10 if cut == 1 else 9  # a line that lacks only its newline is complete
    assert steps_and_losses(tmp_path) == [(s, loss_at(s)) for s in range(1, last + 1)]
    log_steps(tmp_path, range(10, 13), resume_step=9)
    assert steps_and_losses(tmp_path) == [(s, loss_at(s)) for s in range(1, 13)]


def test_zeros_that_a_power_cut_leaves_at_the_end_are_skipped(tmp_path):
    log_steps(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(bytes(4_096))
    assert len(steps_and_losses(tmp_path)) == 3


@pytest.mark.parametrize("damage", [b"{broken}", b"[1, 2]", b'{"time": 1.0}', b""])
def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path, damage):
    log_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damage, *lines[1:]]))
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


@pytest.mark.parametrize("resume_step", [0, 4, 10])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, resume_step):
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    log_steps(tmp_path / "whole", range(1, 21))
    log_steps(tmp_path / "resumed", range(1, 11))
    log = log_steps(tmp_path / "resumed", range(resume_step + 1, 21), resume_step)
    assert log.removed_lines == 10 - resume_step
    assert steps_and_losses(tmp_path / "resumed") == steps_and_losses(tmp_path / "whole")


def test_a_line_is_strict_json_even_when_the_loss_is_not_a_number(tmp_path):
    log = MetricsFile(tmp_path)
    log.write(1, 0.0, {LOSS: math.nan})
    log.close()
    refuse = {"parse_constant": lambda text: pytest.fail(f"{text} is not JSON")}
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), **refuse)
    assert line[LOSS] == "nan"
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0][LOSS])

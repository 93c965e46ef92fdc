import gc
import json
import time

import pytest

from jaxtrain.metrics.step_log import StepLog, StepRecord, name_cause

USUAL_S = 0.1


def lines(workdir):
    return [json.loads(line) for line in (workdir / "hosts" / "3.jsonl").read_text().splitlines()]


def steps(workdir):
    return [line["step"] for line in lines(workdir) if "event" not in line]


def outliers(workdir):
    return {line["step"]: line["cause"] for line in lines(workdir) if "event" in line}


@pytest.fixture
def log(tmp_path):
    log = StepLog(tmp_path, 3)
    yield log
    log.close()


def add_usual(log, first, count=20):
    for step in range(first, first + count):
        log.add(step, USUAL_S + 1e-4 * (step % 5), 0.0)


@pytest.mark.parametrize("jump_s", [-600, 600])
def test_steps_are_written_in_time_after_a_jump_of_the_clock(log, tmp_path, monkeypatch, jump_s):
    add_usual(log, 1, 2)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + jump_s)
    log.flush(wait_s=60)
    assert lines(tmp_path) == []
    time.sleep(0.02)
    log.flush(wait_s=0.01)
    assert steps(tmp_path) == [1, 2]


def test_buffered_steps_become_lines_when_they_are_flushed(log, tmp_path):
    add_usual(log, 1, 2)
    log.add(3, 0.1, 0.02, wire_bytes=(7, 9))
    log.flush(wait_s=60)
    assert lines(tmp_path) == []
    log.flush()
    assert steps(tmp_path) == [1, 2, 3]
    entry = lines(tmp_path)[-1]
    assert entry["perf/step_time_s"] == 0.1 and entry["data/wait_s"] == 0.02
    assert (entry["comm/wire_sent_bytes"], entry["comm/wire_received_bytes"]) == (7, 9)
    assert "comm/wire_sent_bytes" not in lines(tmp_path)[0]


def test_an_outlier_is_an_event_that_names_what_coincided_with_it(log, tmp_path):
    add_usual(log, 1)
    log.add(21, 3 * USUAL_S, 0.0, activities=["save"])
    log.add(22, 3 * USUAL_S, 0.19)
    log.add(23, 3 * USUAL_S, 0.0)
    log.add(24, 1.4 * USUAL_S, 0.19)  # below the limit of 1.5 times the median
    log.flush()
    assert outliers(tmp_path) == {21: "save", 22: "data", 23: "unknown"}
    assert log.outliers == {"save": 1, "data": 1, "unknown": 1}


def test_steps_that_always_vary_are_not_outliers(log, tmp_path):
    for step in range(1, 60):
        log.add(step, USUAL_S * (1 + step % 3), 0.0)
    log.flush()
    assert outliers(tmp_path) == {}


def test_time_in_the_garbage_collector_is_measured_and_named_as_a_cause(log, tmp_path):
    add_usual(log, 1)
    gc.collect()
    assert log.gc_s > 0
    log.gc_s = USUAL_S
    log.add(21, 2 * USUAL_S, 0.0)
    log.flush()
    assert outliers(tmp_path) == {21: "gc"} and log.gc_s == 0.0


def test_a_cause_that_explains_little_of_the_excess_is_not_named():
    record = StepRecord(1, 0.0, 1.0, 0.0, None, ("save",), {"gc": 0.2, "data": 0.1})
    assert name_cause(record, 0.4) == "save+gc+data"
    assert name_cause(record, 0.9) == "save"


def test_a_resumed_process_replaces_the_steps_after_its_checkpoint(tmp_path):
    for resume_step, last in ((0, 10), (4, 7)):
        log = StepLog(tmp_path, 3, resume_step)
        for step in range(resume_step + 1, last + 1):
            log.add(step, USUAL_S, 0.0)
        log.close()
    assert steps(tmp_path) == list(range(1, 8))

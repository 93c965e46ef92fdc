import json

import pytest

from jaxtrain.metrics.collector import Collector
from jaxtrain.metrics.hlo_collectives import Collective
from jaxtrain.metrics.mfu import StepWork
from jaxtrain.metrics.names import measured_names
from jaxtrain.metrics.network import open_network_counters
from jaxtrain.metrics.step_log import StepLog

REDUCE = Collective("all-reduce", 3_000, ("replica",), 2, crosses_hosts=True, times=1)
SENT_BYTES = 3_000  # of it, by the ring's count: a ring of two sends its half twice


class HandWire:
    """Counters moved by hand."""

    names = ["hand0"]

    def __init__(self, read_s=0.0):
        self.read_s, self.sent, self.received = read_s, 1_000, 5_000

    def move(self, sent, received):
        self.sent, self.received = self.sent + sent, self.received + received

    def read(self):
        return self.sent, self.received

    def close(self):
        pass


def build(folder, wire, collectives=(REDUCE,), saving=lambda: False):
    flops = dict(flops_6n=1.0, flops_causal=2.0, flops_full=3.0)
    work = StepWork(
        tokens=100,
        parameters=7,
        **flops,
        hbm_bytes=1.0,
        roofline_s=None,
        collectives=collectives,
        devices=4,
        dtype="float32",
    )
    measure = Collector(work, None, StepLog(folder, 0), wire, saving)
    measure.start({"compile": 1.0})
    return measure


def lines(folder):
    return [json.loads(line) for line in (folder / "hosts" / "0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("read_s", [0.0, 1.0])  # of a look: cheap, and too dear for every step
def test_the_wires_bytes_are_the_steps_and_not_the_pauses(tmp_path, read_s):
    wire = HandWire(read_s)
    with build(tmp_path, wire) as measure:
        for step in (1, 2):
            wire.move(3_300, 3_100)
            measure.tick(step, skipped=False)
        wire.move(100, 0)  # of the step under way
        with measure.pause("eval"):
            wire.move(10**6, 10**6)
        wire.move(3_200, 3_100)
        measure.tick(3, skipped=False)
        summary = measure.summary()
        total = measure.total()
    assert summary["comm/wire_sent_bytes"] == total["comm/wire_sent_bytes"] == 3_300
    assert summary["comm/wire_received_bytes"] == 3_100 and summary["comm/wire_bytes"] == 6_400
    assert summary["comm/overhead"] == pytest.approx(0.1)
    per_step = [line.get("comm/wire_sent_bytes") for line in lines(tmp_path) if "event" not in line]
    assert per_step == ([None] * 3 if read_s else [3_300] * 3)


def test_effective_bandwidth_is_the_payload_over_the_mean_step(tmp_path):
    with build(tmp_path, HandWire()) as measure:
        measure.tick(1, skipped=False)
        measure.tick(2, skipped=False)
        summary = measure.summary()
    step_s = 100 / summary["perf/tokens_per_s"]
    assert summary["comm/effective_bytes_per_s"] == pytest.approx(SENT_BYTES / step_s)
    assert summary["perf/tokens_per_s_per_device"] == summary["perf/tokens_per_s"] / 4


def test_all_that_is_measured_has_a_name_that_is_known(tmp_path):
    with build(tmp_path, HandWire()) as measure:
        with measure.pause("save"):
            pass
        with measure.pause("data"):
            pass
        measure.tick(1, skipped=False)
        assert measure.summary().keys() <= measured_names().keys()
        total = measure.total()
    assert total["lost_s"]["compile"] == 1.0 and total["outliers"] == {}


def test_a_save_is_preceded_by_the_lines_of_its_steps(tmp_path):
    with build(tmp_path, None) as measure:
        measure.tick(1, skipped=False)
        with measure.pause("save"):
            assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_slow_step_beside_a_save_in_the_background_says_so(tmp_path):
    with build(tmp_path, None, saving=lambda: True) as measure:
        measure.tick(1, skipped=False)
        [row] = measure.log._buffer
    assert row.activities == ("start", "save")


def test_one_host_reads_no_wire_unless_told_to(monkeypatch):
    monkeypatch.delenv("JAXTRAIN_INTERFACE", raising=False)
    assert open_network_counters(["a", "a"]) is None
    monkeypatch.setenv("JAXTRAIN_INTERFACE", "lo")
    wire = open_network_counters(["a"])
    assert wire.names == ["lo"]
    wire.close()

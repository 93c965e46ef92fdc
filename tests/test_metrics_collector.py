import json
import time

import pytest

from jaxtrain.distributed.heartbeat import beat
from jaxtrain.metrics.collector import Collector
from jaxtrain.metrics.hlo_collectives import Collective
from jaxtrain.metrics.mfu import StepWork
from jaxtrain.metrics.names import measured_names
from jaxtrain.metrics.network import open_network_counters
from jaxtrain.metrics.step_log import StepLog

REDUCE = Collective("all-reduce", 3_000, ("replica",), 2, crosses_hosts=True, times=1)
SENT_BYTES = 3_000  # each of two devices sends half of the payload twice


class FakeCounters:
    """Network counters that the test sets."""

    names = ["hand0"]

    def __init__(self, read_s=0.0):
        self.read_s, self.sent, self.received = read_s, 1_000, 5_000

    def move(self, sent, received):
        self.sent, self.received = self.sent + sent, self.received + received

    def read(self):
        return self.sent, self.received

    def close(self):
        pass


def build(folder, counters, collectives=(REDUCE,), saving=lambda: False):
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
    collector = Collector(work, None, StepLog(folder, 0), counters, saving)
    collector.start({"compile": 1.0})
    return collector


def lines(folder):
    return [json.loads(line) for line in (folder / "hosts" / "0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("read_s", [0.0, 1.0])  # fast enough for every step; too slow
def test_network_bytes_of_steps_are_counted_and_those_of_pauses_are_not(tmp_path, read_s):
    counters = FakeCounters(read_s)
    with build(tmp_path, counters) as collector:
        for step in (1, 2):
            counters.move(3_300, 3_100)
            collector.tick(step, skipped=False)
        counters.move(100, 0)  # belongs to step 3
        with collector.pause("eval"):
            counters.move(10**6, 10**6)
        counters.move(3_200, 3_100)
        collector.tick(3, skipped=False)
        summary = collector.summary()
        total = collector.total()
    assert summary["comm/wire_sent_bytes"] == total["comm/wire_sent_bytes"] == 3_300
    assert summary["comm/wire_received_bytes"] == 3_100 and summary["comm/wire_bytes"] == 6_400
    assert summary["comm/overhead"] == pytest.approx(0.1)
    per_step = [line.get("comm/wire_sent_bytes") for line in lines(tmp_path) if "event" not in line]
    assert per_step == ([None] * 3 if read_s else [3_300] * 3)


def test_effective_bandwidth_is_the_payload_over_the_mean_step_time(tmp_path):
    with build(tmp_path, FakeCounters()) as collector:
        collector.tick(1, skipped=False)
        collector.tick(2, skipped=False)
        summary = collector.summary()
    step_s = 100 / summary["perf/tokens_per_s"]
    assert summary["comm/effective_bytes_per_s"] == pytest.approx(SENT_BYTES / step_s)
    assert summary["perf/tokens_per_s_per_device"] == summary["perf/tokens_per_s"] / 4


def test_every_metric_has_a_listed_name(tmp_path):
    with build(tmp_path, FakeCounters()) as collector:
        with collector.pause("save"):
            pass
        with collector.pause("data"):
            pass
        collector.tick(1, skipped=False)
        assert collector.summary().keys() <= measured_names().keys()
        total = collector.total()
    assert total["lost_s"]["compile"] == 1.0 and total["outliers"] == {}


def test_steps_before_a_save_are_in_the_log_when_the_save_starts(tmp_path):
    with build(tmp_path, None) as collector:
        collector.tick(1, skipped=False)
        with collector.pause("save"):
            assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_step_during_a_background_save_is_recorded_as_such(tmp_path):
    with build(tmp_path, None, saving=lambda: True) as collector:
        collector.tick(1, skipped=False)
        [record] = collector.log._buffer
    assert record.activities == ("start", "save")


def test_steps_of_another_size_are_compared_with_their_own_kind_only(tmp_path, monkeypatch):
    monkeypatch.setattr(beat, "_path", str(tmp_path / "beat"))
    monkeypatch.setitem(beat._record, "step_s", 2.0)
    with build(tmp_path, None) as collector:
        for step in range(1, 13):
            collector.tick(step, skipped=False)
        collector.summary()
        collector.use(collector.work._replace(tokens=400))
        # The launcher allows a multiple of this time before it calls a process stuck.
        assert json.loads((tmp_path / "beat").read_text())["step_s"] == 8.0
        time.sleep(0.05)
        collector.tick(13, skipped=False)
        window, total = collector.summary(), collector.total()
    assert window["perf/tokens_per_s"] * window["perf/step_time_s"] == pytest.approx(400)
    assert collector.timer.usual_s() == pytest.approx(window["perf/step_time_s"])
    assert total["perf/tokens"] == 12 * 100 + 400
    assert [line["step"] for line in lines(tmp_path) if line.get("first")] == [1, 13]
    outliers = [line["step"] for line in lines(tmp_path) if line.get("event") == "outlier"]
    assert 13 not in outliers


def test_one_host_reads_network_counters_only_if_an_interface_is_set(monkeypatch):
    monkeypatch.delenv("JAXTRAIN_INTERFACE", raising=False)
    assert open_network_counters(["a", "a"]) is None
    monkeypatch.setenv("JAXTRAIN_INTERFACE", "lo")
    counters = open_network_counters(["a"])
    assert counters and counters.names == ["lo"]
    counters.close()

"""What preflight and probe say of the network is what the links of a relayed bed are."""

import dataclasses

import bed as beds
import pytest

from launch import network as meshes
from launch import probe
from launch.inventory import read_inventory
from launch.preflight import preflight
from launch.ssh import HostError, SshClient

reason = beds.available(relayed=True)
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    with beds.Bed(2, shared, relayed=True) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(made.folder))
        yield made


@pytest.fixture
def fleet(bed):
    bed.link("*", "*", delay_ms=0, rate_mbit=0)
    hosts = read_inventory(bed.inventory(bed.folder / "hosts.toml")).hosts
    return SshClient(hosts, str(bed.ssh_config))


def test_the_probe_sees_round_trips_and_rates_of_a_link_and_counts_what_it_sends(bed, fleet):
    bed.link("h0", "h1", delay_ms=5, rate_mbit=80)
    before = bed.traffic()["h0 > h1"]["bytes"]
    found = probe.measure_tcp(fleet, seconds=0.5, pings=5)
    ways = [(pair["from"], pair["streams"], pair["both"]) for pair in found]
    assert sorted(ways) == [(h, s, b) for h in bed.names for s in (1, 4, 8) for b in (False, True)]
    assert all(pair["rtt_p50_s"] == pytest.approx(0.010, abs=0.005) for pair in found)
    for pair in found:
        if pair["streams"] == 1 and not pair["both"]:
            wire_bytes_per_s = pair["bytes_per_s"] * (1 + pair["header_share"])
            assert 4e6 < wire_bytes_per_s < 11e6  # of 10e6: half a second tells no more
    reckoned = sum(
        pair["bytes"] / (2 if pair["both"] else 1) * (1 + pair["header_share"])
        for pair in found
        if pair["from"] == "h0" or pair["both"]
    )
    assert bed.traffic()["h0 > h1"]["bytes"] - before == pytest.approx(reckoned, rel=0.1)


def test_a_long_link_is_warned_of_with_what_its_buffers_let_one_stream_carry(bed, fleet):
    near = [found for found in preflight(fleet, 23_456) if found.check.startswith("to ")]
    assert all("Mbit/s" in found.value and not found.problem for found in near)
    bed.link("h0", "h1", delay_ms=40)
    far = [found for found in preflight(fleet, 23_456) if found.check.startswith("to ")]
    assert len(far) == len(near) == 2
    for found in far:
        assert found.value.startswith("8") and "Mbit/s" not in found.value  # no burst could tell
        assert "one stream at most" in found.problem and not found.fatal


def test_a_host_that_hangs_is_given_up_by_name_and_the_others_are_looked_at(
    bed, fleet, monkeypatch
):
    monkeypatch.setattr(meshes, "FIRST_ANSWER_S", 3.0)
    bed.run("h1", "sh", "-c", "printf '#!/bin/sh\nexec sleep 100\n' > /root/h && chmod +x /root/h")
    hangs = dataclasses.replace(fleet.hosts[1], python="/root/h")
    found = preflight(SshClient([fleet.hosts[0], hangs], str(bed.ssh_config)), 23_456)
    reached = {f.host: f.problem for f in found if f.check == "reach"}
    assert reached == {"h0": "", "h1": "h1: no answer within 3 s. Log in and see what hangs there."}


def test_a_host_that_stops_answering_is_given_up_by_name(bed, fleet, monkeypatch):
    monkeypatch.setattr(meshes, "ANSWER_S", 1.0)
    with meshes.NetworkAgents(fleet) as agents:
        [pid] = [pid for pid, line in bed.processes("h1").items() if "python" in line.split()[0]]
        bed.run("h1", "kill", "-STOP", pid)
        assert "rtt_s" in agents.answer_with_clock(fleet.hosts[0])
        with pytest.raises(HostError, match="h1: it gave no answer within 1 s"):
            agents.answer_with_clock(fleet.hosts[1])


def test_a_folder_that_is_not_one_for_all_hosts_is_refused_and_no_trace_is_left_in_one(bed, fleet):
    refused = [f for f in preflight(fleet, 23_456, "/root/own", burst_s=0) if f.problem]
    assert [(f.host, f.check, f.fatal) for f in refused] == [("h1", "shared", True)]
    assert "--config.checkpoint.storage=host0" in refused[0].problem
    assert not [f for f in preflight(fleet, 23_456, "/mnt/shared", burst_s=0) if f.problem]
    assert bed.run("h0", "ls", "-A", "/mnt/shared", "/root/own").split() == [
        "/mnt/shared:",
        "/root/own:",
    ]

"""Checks that preflight and the probe measure the configured links of a relayed test bed."""

import dataclasses
import json

import bed as beds
import pytest

from jaxtrain.planning.sites_model import read_link
from launch import network, probe
from launch.inventory import read_inventory
from launch.preflight import preflight
from launch.ssh import HostError, SshClient

reason = beds.available(relayed=True)
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    shared = tmp_path_factory.mktemp("shared")
    with beds.Bed(2, shared, relayed=True) as bed, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(bed.folder))
        yield bed


@pytest.fixture
def client(bed):
    bed.link("*", "*", delay_ms=0, rate_mbit=0)
    hosts = read_inventory(bed.inventory(bed.folder / "hosts.toml")).hosts
    return SshClient(hosts, str(bed.ssh_config))


def test_the_probe_measures_a_links_round_trip_rate_and_bytes(bed, client, monkeypatch):
    monkeypatch.setattr(probe, "STREAMS", (1, 4))
    bed.link("h0", "h1", delay_ms=5, rate_mbit=80)
    before = bed.traffic()["h0 > h1"]["bytes"]
    pairs = probe.measure_tcp(client, seconds=0.5, pings=5)
    cases = [(pair["from"], pair["streams"], pair["both"]) for pair in pairs]
    assert sorted(cases) == [(h, s, b) for h in bed.names for s in (1, 4) for b in (False, True)]
    assert all(pair["rtt_p50_s"] == pytest.approx(0.010, abs=0.005) for pair in pairs)
    for pair in pairs:
        if pair["streams"] == 1 and not pair["both"]:
            wire_bytes_per_s = pair["bytes_per_s"] * (1 + pair["header_share"])
            assert 4e6 < wire_bytes_per_s < 11e6  # the link: 10e6, measured for only half a second
    expected = sum(
        pair["bytes"] / (2 if pair["both"] else 1) * (1 + pair["header_share"])
        for pair in pairs
        if pair["from"] == "h0" or pair["both"]
    )
    assert bed.traffic()["h0 > h1"]["bytes"] - before == pytest.approx(expected, rel=0.1)


def test_preflight_warns_of_a_long_link_whose_buffers_limit_a_stream(bed, client):
    find_links = lambda: [f for f in preflight(client, 23_456) if f.check.startswith("to ")]
    near = find_links()
    assert all("Mbit/s" in finding.value and not finding.problem for finding in near)
    bed.link("h0", "h1", delay_ms=40)
    far = find_links()
    assert len(far) == len(near) == 2
    for finding in far:
        assert finding.value.startswith("8") and "Mbit/s" not in finding.value  # no burst
        assert "limit one stream" in finding.problem and not finding.fatal


def test_preflight_abandons_a_hanging_host_and_checks_the_others(bed, client, monkeypatch):
    monkeypatch.setattr(network, "FIRST_ANSWER_S", 2.5)
    bed.run("h1", "sh", "-c", "printf '#!/bin/sh\nexec sleep 100\n' > /root/h && chmod +x /root/h")
    hanging = dataclasses.replace(client.hosts[1], python="/root/h")
    findings = preflight(SshClient([client.hosts[0], hanging], str(bed.ssh_config)), 23_456)
    problem_of = {f.host: f.problem for f in findings if f.check == "reach"}
    expected = "h1: no answer within 2 s. Log in and see what hangs there."
    assert problem_of == {"h0": "", "h1": expected}


def test_a_host_that_stops_answering_is_named(bed, client, monkeypatch):
    monkeypatch.setattr(network, "ANSWER_S", 1.0)
    with network.NetworkAgents(client) as agents:
        [pid] = [pid for pid, line in bed.processes("h1").items() if "python" in line.split()[0]]
        bed.run("h1", "kill", "-STOP", pid)
        assert "rtt_s" in agents.answer_with_clock(client.hosts[0])
        with pytest.raises(HostError, match="h1: it gave no answer within 1 s"):
            agents.answer_with_clock(client.hosts[1])


def test_a_folder_that_hosts_do_not_share_is_refused_and_no_file_is_left_in_it(bed, client):
    refused = [f for f in preflight(client, 23_456, "/root/own", burst_s=0) if f.problem]
    assert [(f.host, f.check, f.fatal) for f in refused] == [("h1", "shared", True)]
    assert "--config.checkpoint.storage=host0" in refused[0].problem
    assert not [f for f in preflight(client, 23_456, "/mnt/shared", burst_s=0) if f.problem]
    assert bed.run("h0", "ls", "-A", "/mnt/shared", "/root/own").split() == [
        "/mnt/shared:",
        "/root/own:",
    ]


def test_a_plan_reads_the_link_that_the_probe_measured_between_sites(bed, client, monkeypatch):
    monkeypatch.setattr(probe, "STREAMS", (1, 4))
    paths = [bed.inventory(bed.folder / f"{n}.toml", only=[n], site_port=7_301) for n in bed.names]
    bed.link("h0", "h1", delay_ms=5, rate_mbit=80)
    options = [f"--sites={paths[0]},{paths[1]}", f"--ssh_config={bed.ssh_config}"]
    result = probe.measure_sites(probe.parse([*options, "--seconds=0.5", "--pings=5"]))
    assert {(pair["from"], pair["to"]) for pair in result["tcp"]} == {("h0.h0", "h1.h1")}
    (bed.folder / "sites.json").write_text(json.dumps(result))
    link = read_link(bed.folder / "sites.json")
    assert 4e6 < link.bytes_per_s < 11e6  # of each direction: 10e6
    assert link.round_trip_s == pytest.approx(0.010, abs=0.005)

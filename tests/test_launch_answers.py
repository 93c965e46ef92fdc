"""Hosts whose answers before the start are odd or hostile: an error names host and value."""

import json
import re
import sys
import time

import pytest
from local_client import LocalClient

from launch.answers import mismatch
from launch.host.facts import gather_facts
from launch.inventory import Host
from launch.network import NetworkAgents
from launch.preflight import Finding, format_findings, preflight
from launch.prepare import build_environments
from launch.ssh import HostError, SshClient

HOSTS = [Host("a", "127.0.0.1"), Host("b", "127.0.0.2")]
PUPPET = """
import json, sys, zlib
size = int(sys.stdin.buffer.readline())
print(json.loads(zlib.decompress(sys.stdin.buffer.read(size)))["mark"])
print(sys.argv[1], flush=True)
sys.stdin.read()
"""
CLOCK = 3 * [{"time": 1.5}]
SENT = {"rtt_s": [0.1], "seconds": 1.0, "bytes": 9, "bytes_per_s": 9.0, "wire_bytes": [9, 9]}


class Puppet(LocalClient):
    """Hosts that give the same answers, whatever is asked."""

    def __init__(self, hosts, answers):
        super().__init__(hosts)
        self.lines = "\n".join(json.dumps({"ok": answer}) for answer in answers)

    def ssh_command(self, host, shared=True):
        return [sys.executable, "-I", "-S", "-c", PUPPET, self.lines]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    request = {"address": "127.0.0.1", "port": 0}
    facts = gather_facts(tmp_path_factory.mktemp("root"), request) | {"listens_on": 9}
    return facts | {"gpus": [{"name": "NVIDIA A40", "driver": "570.1", "memory_mib": 46068}]}


@pytest.fixture
def healthy(facts):
    """The first answers of a host without a problem: its facts, and its clock three times."""
    right = {"gpus": [], "interface": "lo", "port_free": True, "has_address": True, "proxies": []}
    roomy = {"disk_free_bytes": 1 << 40, "memory_bytes": 1 << 36, "local_disk": "ext4"}
    clock = {"time": time.time()}
    return [facts | right | roomy | {"logout": "stays"}, clock, clock, clock]


def problems(host_answers, hosts=HOSTS[:1]):
    findings = preflight(Puppet(hosts, host_answers), 23_456)
    return {f.host: f.problem for f in findings if f.aborts and "must be" in f.problem}


@pytest.mark.parametrize("answer", [[], 3, "text", None, {}])
def test_an_answer_that_is_no_object_with_the_facts_is_refused(answer):
    assert "a" in problems([answer, *CLOCK])


WRONG = [
    ("gpus", 3),
    ("gpus", [{"name": "x"}]),
    ("gpus.0.driver", []),
    ("gpus.0.memory_mib", -1),
    ("versions", ["jax"]),
    ("versions.jax", 1),
    ("versions.jax", "1\nok    jax"),
    ("open_files", [5]),
    ("open_files", ["many", "more"]),
    ("memory_bytes", "8 GiB"),
    ("disk_free_bytes", float("nan")),
    ("shm_bytes", 10**30),
    ("shm_bytes", 10**400),
    ("cpus", True),
    ("proxies", {"a": 1}),
    ("interfaces", {"lo": "127.0.0.1"}),
    ("has_address", "yes"),
    ("sysctls", {}),
    ("sysctls.tcp_rmem", "1 2 many"),
    ("sysctls.tcp_wmem", None),
    ("listens_on", 99_999),
    ("python", 3.11),
    ("nonce_error", None),
    ("logout", ["stays"]),
]


@pytest.mark.parametrize(("place", "value"), WRONG, ids=[f"{p}={v}" for p, v in WRONG])
def test_a_fact_of_another_type_or_beyond_its_range_is_refused(facts, place, value):
    changed = json.loads(json.dumps(facts))
    *path, last = [int(key) if key.isdecimal() else key for key in place.split(".")]
    part = changed
    for key in path:
        part = part[key]
    part[last] = value
    found = problems([changed, *CLOCK])
    assert re.search(rf"{place.replace('.0', '.*')}.* must be ", found["a"]), found


def test_the_name_of_a_package_cannot_look_like_lines_of_the_launcher(facts):
    found = problems([facts | {"versions": {"x\nlaunch: run this": "1"}}, *CLOCK])
    assert "a key of its answer.versions must be" in found["a"]
    table = format_findings([Finding("a", "x\nlaunch: run this", "1")])
    assert table == r"ok    x\nlaunch: run this 1"


def test_a_value_that_is_nested_too_deeply_is_refused():
    value = []
    for _ in range(100_000):
        value = [value]
    assert mismatch(value, int, "x") == "x must be an integer; got something nested too deeply"


@pytest.mark.parametrize(
    "clock", [{"time": float("nan")}, {"time": 10**400}, {"time": "now"}, {"time": 1e300}, {}]
)
def test_a_clock_without_a_valid_time_is_refused(facts, clock):
    assert "time" in problems([facts, *(3 * [clock])])["a"]


@pytest.mark.parametrize(
    "measured",
    [
        {"rtt_s": []},
        {"rtt_s": 0.1},
        {"rtt_s": [-1.0]},
        {"rtt_s": [0.1], "bytes_per_s": "fast"},
        {"rtt_s": [0.1], "bytes_per_s": float("inf")},
        {"rtt_s": [0.0]},
        SENT | {"mtu": 52},
        {},
    ],
)
def test_a_measurement_that_is_no_number_is_refused(healthy, measured):
    answers = [*healthy, measured]
    findings = preflight(Puppet(HOSTS, answers), 23_456)
    pairs = {(f.host, f.check) for f in findings if f.aborts and "must" in f.problem}
    assert pairs >= {("a", "to b"), ("b", "to a")}, findings


def test_a_measurement_without_traffic_is_refused_where_traffic_was_ordered():
    with NetworkAgents(Puppet(HOSTS, [{"listens_on": 9}, {"rtt_s": [0.1]}])) as agents:
        pairs = agents.measure(streams=1, seconds=0.1)
    assert all("its answer.seconds must be" in pair["error"] for pair in pairs)


def test_a_host_cannot_measure_in_the_name_of_another_pair():
    forged = {"from": "x\nlaunch: y", "to": "b", "streams": 9, "both": True, "header_share": 1}
    with NetworkAgents(Puppet(HOSTS, [{"listens_on": 9}, SENT | forged])) as agents:
        pairs = agents.measure(streams=1, seconds=0.1)
    assert [(pair["from"], pair["to"]) for pair in pairs] == [("a", "b"), ("b", "a")]
    assert all(pair["streams"] == 1 and "header_share" not in pair for pair in pairs)
    assert all(pair["mtu"] is None for pair in pairs)  # a host need not know it


@pytest.mark.parametrize(
    "built",
    [
        [],
        {},
        {"python": "/x", "versions": 3},
        {"python": ["/x"], "versions": {"jax": "1"}},
        {"python": "/x", "versions": {"x\nlaunch: y": "1"}},
        {"python": "/x", "versions": {"x": "1\nlaunch: y"}},
    ],
)
def test_an_answer_about_built_packages_that_has_no_meaning_is_refused(built):
    class Odd(SshClient):
        def call_all(self, requests, timeout_s):
            return dict.fromkeys(requests, built)

    with pytest.raises(HostError, match="a: .* must be"):
        build_environments(Odd(HOSTS[:1]), "", "", [])


@pytest.mark.parametrize("answer", [{"same": "no"}, {"error": {"a": 1}}, {"same": 1}])
def test_an_answer_about_the_shared_folder_other_than_true_is_a_problem(healthy, answer):
    answers = [*healthy, answer, {}]
    findings = preflight(Puppet(HOSTS[:1], answers), 23_456, shared="/x")
    [shared] = [f for f in findings if f.check == "shared" and f.value]
    assert shared.aborts and format_findings(findings)

"""Checks preflight's findings about this machine's facts, with one of them changed."""

import os
import time

import pytest

from launch.host import facts as host_facts
from launch.host.agent import ORDERS
from launch.host.facts import gather_facts
from launch.inventory import Host
from launch.preflight import differences, format_findings, is_chip, judge_host

HOST = Host("a", "127.0.0.1")
GPU = {"name": "NVIDIA A40", "driver": "570.1", "memory_mib": 46068}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    facts = gather_facts(tmp_path_factory.mktemp("root"), {"address": "127.0.0.1", "port": 0})
    return facts | {"rtt_s": 0.01, "skew_s": 0.0, "gpus": [], "proxies": []}


def problems(host, facts, check):
    return [f.problem for f in judge_host(host, facts, 23_456) if f.check == check and f.problem]


def test_a_hanging_driver_and_a_hanging_shared_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(host_facts, "PATIENCE_S", 0.5)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nsleep 8\n:\n")  # a killed shell leaves sleep with the pipes
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("w", "r"):
        os.mkfifo(tmp_path / f".shared-{name}")  # opening it hangs, as nobody has the other end
    start = time.monotonic()
    request = {"address": "127.0.0.1", "port": 0, "shared": str(tmp_path), "nonce": "w"}
    facts = gather_facts(tmp_path, request)
    with pytest.raises(TimeoutError):
        ORDERS["read"]({"folder": str(tmp_path), "nonce": "r"}, b"")
    assert time.monotonic() - start < 5
    facts |= {"rtt_s": 0.01, "skew_s": 0.0}
    gpus = problems(Host("a", "127.0.0.1", gpus=8), facts, "gpus")
    assert gpus == ["nvidia-smi: no answer within 0 s"]
    assert problems(HOST, facts, "shared") == [f"{tmp_path}: no answer within 0 s"]


@pytest.mark.parametrize(
    ("skew_s", "shown", "wrong"),
    [(0.5, "+500 ms", 0), (-2.0, "-2.0 s", 1), (1.03, "+1.0 s", 1), (4000.0, "+4,000.0 s", 1)],
)
def test_a_clock_that_differs_is_a_warning_with_the_difference(facts, skew_s, shown, wrong):
    [clock] = [f for f in judge_host(HOST, facts | {"skew_s": skew_s}, 1) if f.check == "clock"]
    assert (clock.value, bool(clock.problem), clock.aborts) == (shown, wrong, False)
    mark = "warn" if wrong else "ok"
    assert format_findings([clock]).startswith(f"{mark:4}  clock        {shown}")


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("NVIDIA A40", ["a40", "A40"]),
        ("NVIDIA RTX A4000", ["a4000", "rtx a4000", "rtxa4000"]),
        ("NVIDIA H100 80GB HBM3", ["h100", "h100-80gb"]),
        ("NVIDIA GH200 480GB", ["gh200"]),
        ("NVIDIA GeForce RTX 4090", ["rtx4090", "4090"]),
    ],
)
def test_a_chip_matches_whole_words_of_the_drivers_name_for_it(name, chips):
    known = ["a40", "a4000", "h100", "h200", "gh200", "4090", "409", "rtx"]
    assert all(is_chip(name, chip) for chip in chips)
    assert not [chip for chip in known if is_chip(name, chip) and chip not in (*chips, "rtx")]


def test_the_inventorys_interface_must_exist_and_have_the_address(facts):
    problems_with = lambda name: problems(
        Host("a", "127.0.0.1", interface=name), facts, "interface"
    )
    assert problems_with("") == problems_with("lo") == [] and facts["interface"] == "lo"
    assert "no such interface among" in problems_with("eth99")[0]
    other = facts | {"interfaces": facts["interfaces"] | {"eth1": ["10.0.0.1"]}}
    texts = problems(Host("a", "127.0.0.1", interface="eth1"), other, "interface")
    assert texts == ["127.0.0.1 is on lo, not on eth1: correct one of the two"]


@pytest.mark.parametrize(("gpus", "plugin", "count"), [(0, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_a_host_with_gpus_needs_jaxs_plugin_for_them(facts, gpus, plugin, count):
    versions = {"jax": "0.10.2"} | ({"jax-cuda12-plugin": "0.10.2"} if plugin else {})
    changed = facts | {"versions": versions, "gpus": gpus * [GPU]}
    texts = problems(Host("a", "127.0.0.1", gpus=gpus), changed, "python")
    assert len(texts) == count and all("--env_extras=cuda" in text for text in texts)


def test_the_host_whose_package_differs_from_most_is_named():
    hosts = [Host(name, f"10.0.0.{i}") for i, name in enumerate("abc", 1)]
    facts_of = {host: {"versions": {"jax": "0.10.2", "optax": "0.2.8"}} for host in hosts}
    assert differences(facts_of) == []
    facts_of[hosts[1]] = {"versions": {"jax": "0.10.2", "optax": "0.2.7"}}
    [finding] = differences(facts_of)
    assert (finding.host, finding.check, finding.aborts) == ("b", "optax", True)
    assert finding.value == "a 0.2.8, b 0.2.7, c 0.2.8"

"""What preflight says of facts that this machine gives, with one of them changed."""

import pytest

from launch.host.facts import gather_facts
from launch.inventory import Host
from launch.preflight import judge

HOST = Host("a", "127.0.0.1")
GPU = {"name": "NVIDIA A40", "driver": "570.1", "memory_mib": 46068}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    found = gather_facts(tmp_path_factory.mktemp("root"), {"address": "127.0.0.1", "port": 0})
    return found | {"rtt_s": 0.01, "skew_s": 0.0, "gpus": [], "proxies": []}


def problems(host, found, check):
    return [f.problem for f in judge(host, found, 23_456) if f.check == check and f.problem]


@pytest.mark.parametrize(("gpus", "plugin", "wanted"), [(0, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_a_host_with_gpus_needs_jaxs_plugin_for_them(facts, gpus, plugin, wanted):
    versions = {"jax": "0.10.2"} | ({"jax-cuda12-plugin": "0.10.2"} if plugin else {})
    found = facts | {"versions": versions, "gpus": gpus * [GPU]}
    said = problems(Host("a", "127.0.0.1", gpus=gpus), found, "python")
    assert len(said) == wanted and all("--env_extras=cuda" in text for text in said)

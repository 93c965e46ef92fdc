import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.host.ranks import RankProcess, decisive_lines

ROOT = Path(__file__).parent.parent
START = """
import json, sys
from pathlib import Path
from launch.host.log import Log, read
from launch.host.ranks import LocalRanks
folder = Path(sys.argv[2])
ranks = LocalRanks(json.loads(sys.argv[1]), folder, Log(folder / "log"))
ranks.start(1, {"members": [0], "coordinator": "127.0.0.1:1"})
while ranks.ranks[0].code is None:
    ranks.poll(0.02)
print(read(folder / "log", 0)[1].decode())
"""


def environment_of_rank(folder, names, env=(), **job):
    """Starts a rank of a job; returns the variables `names` of its environment."""
    program = "import json, os\nprint(json.dumps(dict(os.environ)))"
    spec = {"id": f"test-{os.getpid()}", "me": 0, "ranks_per_host": 1, "gpus": 0, "env": dict(env)}
    spec |= {"hosts": [{"name": "a", "address": "127.0.0.1"}], "cwd": str(folder)}
    spec |= {"argv": [sys.executable, "-c", program]} | job
    # In a process of its own, as LocalRanks reaps every child of its process.
    argv = [sys.executable, "-c", START, json.dumps(spec), tempfile.mkdtemp(dir=folder)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, check=True)
    environment = json.loads(done.stdout)
    return tuple(environment.get(name) for name in names)


def test_jax_cannot_fall_back_to_the_cpu_on_a_host_with_gpus(tmp_path, monkeypatch):
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    names = ("JAX_PLATFORMS", "JAXTRAIN_LOCAL_DEVICES", "JAXTRAIN_HEARTBEAT_S")
    assert environment_of_rank(tmp_path, names) == (None, None, "60")  # twice LocalRanks' silent_s
    names = names[:2]
    assert environment_of_rank(tmp_path, names, gpus=8) == ("cuda,cpu", "8")
    env = {"JAX_PLATFORMS": "cpu"}
    assert environment_of_rank(tmp_path, names, env, gpus=8) == ("cpu", None)


def test_several_hosts_use_the_interface_of_their_address(tmp_path):
    names = ("JAXTRAIN_INTERFACE", "NCCL_SOCKET_IFNAME")
    hosts = [{"name": n, "address": a} for n, a in (("a", "127.0.0.1"), ("b", "127.0.0.2"))]
    assert environment_of_rank(tmp_path, names) == (None, None)
    assert environment_of_rank(tmp_path, names, hosts=hosts) == ("lo", "=lo")
    env = {"NCCL_SOCKET_IFNAME": "=ib0"}
    assert environment_of_rank(tmp_path, names, env, hosts=hosts) == ("lo", "=ib0")


def test_the_decisive_lines_are_those_that_name_an_error():
    error = "OSError: [Errno 28] No space left"
    assert decisive_lines(["step 1", "Traceback (most recent call last):", error, "bye"]) == [error]
    assert decisive_lines(["only this"]) == ["only this"]


def test_only_the_time_between_heartbeats_makes_a_rank_stuck_and_not_a_jump_of_the_clock(tmp_path):
    beat = tmp_path / "beat"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        rank = RankProcess(0, process, beat, b"", has_heartbeat=False)
        assert rank.report(10.0)["age_s"] is None  # whether it writes any is not known yet
        beat.write_text(json.dumps({"beats": 1, "time": time.time() - 600}))
        ages_s = [rank.report(now)["age_s"] for now in (10.0, 14.0)]
        beat.write_text(json.dumps({"beats": 2, "time": time.time() + 600}))
        ages_s += [rank.report(now)["age_s"] for now in (15.0, 17.5)]
        assert ages_s == [0.0, 4.0, 0.0, 2.5]
        process.communicate(b"\n")

"""One supervisor as a process of its own, on this machine: a job of one host on loopback."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.host.channel import free_port
from launch.host.restart_policy import Policy

ROOT = Path(__file__).parent.parent
SUPERVISE = (
    "import sys, pathlib; from launch.host.supervise import Supervisor\n"
    "sys.exit(Supervisor(pathlib.Path(sys.argv[1]), False).run())"
)
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
FILL = """
import os
def fill():
    try:
        with open("fill", "ab", buffering=0) as file:
            while True:
                file.write(bytes(512))
    except OSError:
        pass
"""


@pytest.fixture
def disk(tmp_path):
    """A disk of 256 KiB."""
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def supervise(folder, program, address="127.0.0.1", **job):
    """Starts the supervisor of a job whose one process runs the program's text in `folder`."""
    spec = {"id": f"test-{os.getpid()}", "me": 0, "ranks_per_host": 1, "gpus": 0, "env": {}}
    spec |= {"hosts": [{"name": "a", "address": address}], "token": "a" * 64, "cwd": str(folder)}
    spec |= {"port": free_port(address), "policy": dataclasses.asdict(Policy(restarts=0))}
    spec |= {"argv": [sys.executable, "-c", program]} | job
    (folder / "job.json").write_text(json.dumps(spec))
    return subprocess.Popen([sys.executable, "-c", SUPERVISE, folder], cwd=ROOT)


def outcome_in(folder):
    return json.loads((folder / "status.json").read_text())["outcome"]


def started(folder, env=(), **job):
    """The environment of the process that a host starts of a job, told by the process."""
    program = "import json, os\nprint(json.dumps(dict(os.environ)))"
    spec = {"id": f"test-{os.getpid()}", "me": 0, "ranks_per_host": 1, "gpus": 0, "env": dict(env)}
    spec |= {"hosts": [{"name": "a", "address": "127.0.0.1"}], "cwd": str(folder)}
    spec |= {"argv": [sys.executable, "-c", program]} | job
    argv = [sys.executable, "-c", START, json.dumps(spec), tempfile.mkdtemp(dir=folder)]
    return json.loads(subprocess.run(argv, cwd=ROOT, capture_output=True, check=True).stdout)


def test_on_a_host_with_gpus_jax_may_not_fall_back_to_the_cpu(tmp_path, monkeypatch):
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    names = ("JAX_PLATFORMS", "JAXTRAIN_LOCAL_DEVICES")
    given = lambda **job: tuple(started(tmp_path, **job).get(name) for name in names)
    assert given() == (None, None)
    assert given(gpus=8) == ("cuda,cpu", "8")
    assert given(gpus=8, env={"JAX_PLATFORMS": "cpu"}) == ("cpu", None)


def test_of_several_hosts_each_keeps_to_the_interface_of_its_address(tmp_path):
    names = ("JAXTRAIN_INTERFACE", "NCCL_SOCKET_IFNAME")
    given = lambda **job: tuple(started(tmp_path, **job).get(name) for name in names)
    one, two = ({"name": n, "address": a} for n, a in (("a", "127.0.0.1"), ("b", "127.0.0.2")))
    assert given(hosts=[one]) == (None, None)
    assert given(hosts=[one, two]) == ("lo", "=lo")
    assert given(hosts=[one, two], env={"NCCL_SOCKET_IFNAME": "=ib0"}) == ("lo", "=ib0")


def test_the_outcome_of_a_job_that_filled_its_disk_is_kept(disk):
    process = supervise(disk, f"{FILL}\nfill()")
    assert process.wait(20) == 0
    assert outcome_in(disk)["why"] == "done" and not (disk / "reserve").exists()


def test_processes_meet_at_an_ipv6_address(tmp_path):
    program = """
import os
from jaxtrain.distributed.cluster import detect_world
from jaxtrain.distributed.runtime import join_processes
join_processes(detect_world(os.environ))
open("joined", "w").write(os.environ["JAX_COORDINATOR_ADDRESS"])
os._exit(0)
"""
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert supervise(tmp_path, program, "::1", env=env).wait(60) == 0
    assert (tmp_path / "joined").read_text().startswith("[::1]:")


def test_a_supervisor_stays_until_there_is_room_for_the_outcome(disk):
    process = supervise(disk, f"{FILL}\nfill()\nos.unlink('reserve')\nfill()")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)
    assert outcome_in(disk) is None
    (disk / "fill").unlink()
    assert process.wait(20) == 0 and outcome_in(disk)["why"] == "done"


def test_a_program_beats_on_where_the_disk_is_full(disk):
    program = f"""{FILL}
from jaxtrain.distributed.heartbeat import beat
beat("train", 1)
fill()
beat("train", 2)
"""
    env = os.environ | {"JAXTRAIN_BEAT": str(disk / "beat"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=disk, env=env, check=True)
    assert json.loads((disk / "beat").read_text())["step"] == 2

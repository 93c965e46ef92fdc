"""Runs a supervisor in a separate process, with a job whose only host is this machine."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from web_server import SECRET, Server

from launch.host import requests
from launch.host.channel import LeaderChannel
from launch.host.interfaces import free_port
from launch.host.log import read
from launch.host.restart_policy import Policy
from launch.host.supervise import Supervisor

ROOT = Path(__file__).parent.parent
SUPERVISE = (
    "import sys, pathlib; from launch.host.supervise import Supervisor\n"
    "sys.exit(Supervisor(pathlib.Path(sys.argv[1])).run())"
)
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


def supervise(folder, program, address="127.0.0.1", env=()):
    """Starts the supervisor of a job whose only rank runs the text `program` in `folder`."""
    spec = {"id": f"test-{os.getpid()}", "me": 0, "ranks_per_host": 1, "gpus": 0, "env": dict(env)}
    spec |= {"hosts": [{"name": "a", "address": address}], "token": "a" * 64, "cwd": str(folder)}
    spec |= {"port": free_port(address), "policy": dataclasses.asdict(Policy(restarts=0))}
    spec |= {"argv": [sys.executable, "-c", program]}
    (folder / "job.json").write_text(json.dumps(spec))
    return subprocess.Popen([sys.executable, "-c", SUPERVISE, folder], cwd=ROOT)


@pytest.fixture
def start_leader(tmp_path):
    """Starts the first host's supervisor of two in this process; the second does not exist."""
    hosts = [{"name": name, "address": "127.0.0.1"} for name in "ab"]
    spec = {"id": f"test-{os.getpid()}", "me": 0, "ranks_per_host": 1, "gpus": 0, "hosts": hosts}
    spec |= {"token": "a" * 64, "port": free_port("127.0.0.1"), "policy": {"lease_s": 30.0}}
    (tmp_path / "job.json").write_text(json.dumps(spec))
    supervisors = []

    def start():
        for former in supervisors:
            former.followers.close()  # it gives up its port
        supervisors.append(Supervisor(tmp_path))
        return supervisors[-1]

    yield start
    for supervisor in supervisors:
        supervisor.followers.close()


def test_the_leader_waits_for_a_host_whose_clock_is_slow_to_learn_the_outcome(start_leader):
    leader, now = start_leader(), time.monotonic()
    leader.ranks.living = list  # other tests' processes may be children of this one
    report = leader.report() | {"host": 1, "knows": False, "time": time.time() - 600}
    leader.controller.take_report(report, now)
    assert not leader._may_finish(now)
    leader.controller.take_report(report | {"knows": True}, now)
    assert leader._may_finish(now)


def test_a_jump_of_the_clock_does_not_end_the_operators_lease(start_leader):
    leader = start_leader()
    lease, ages_s = leader.folder / "lease", []
    lease.touch()
    for seconds in (0, -600, 600):  # as if the clock had jumped after the operator renewed it
        renewed = time.time() + seconds
        os.utime(lease, (renewed, renewed))
        ages_s.append(leader.report()["lease_age_s"])
    time.sleep(0.2)
    ages_s.append(leader.report()["lease_age_s"] - 0.2)
    assert all(0 <= age_s < 5 for age_s in ages_s), ages_s


def test_reports_leave_no_garbage_in_cycles(start_leader):
    """A supervisor makes two reports a second; such garbage, of a few objects, stays for long."""
    leader = start_leader()

    def report():
        leader._lead(leader.report(), time.monotonic())
        leader._write_status(leader.report())

    report()
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            report()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_jump_of_the_clock_does_not_change_the_age_of_a_status(start_leader, monkeypatch):
    leader, clock, monotonic = start_leader(), time.time, time.monotonic
    monkeypatch.setattr(requests, "job_folder", lambda request: leader.folder)
    age_s = lambda: requests.status({"job": leader.job["id"]})["age_s"]
    assert leader._write_status(leader.report())
    for jump_s in (600, -600):
        monkeypatch.setattr(time, "time", lambda: clock() + jump_s)  # noqa: B023
        assert 0 <= age_s() < 5
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 20)
    assert 20 <= age_s() < 25
    monkeypatch.setattr(requests.processes, "boot_id", lambda: "another")
    assert age_s() == 0


def test_a_host_says_whether_the_first_hosts_supervisor_is_silent_or_has_ended(tmp_path):
    port, spec = free_port("127.0.0.1"), {"id": "test", "me": 1, "ranks_per_host": 1, "gpus": 0}
    spec |= {"hosts": [{"name": name, "address": "127.0.0.1"} for name in "ab"], "port": port}
    spec |= {"token": "a" * 64, "policy": {"wait_s": 100.0}}
    (tmp_path / "job.json").write_text(json.dumps(spec))
    leader = LeaderChannel("127.0.0.1", port, spec["token"])
    follower, report = Supervisor(tmp_path), {"host": 1}

    def outcome_after(silent_s):
        follower._target = follower._target | {"outcome": None}
        follower._target_at = time.monotonic() - silent_s
        follower._follow(report, time.monotonic())
        return follower._target["outcome"]

    connecting = threading.Thread(target=outcome_after, args=(0.0,))
    connecting.start()
    while connecting.is_alive():
        leader.receive_reports()  # it greets, and never answers: as if stopped from now on
    assert outcome_after(50.0) is None
    assert outcome_after(101.0)["why"].startswith("a: its supervisor sent nothing for 101 s; ")
    leader.close()
    why, deadline = "", time.monotonic() + 10
    while "its supervisor ended and is not back" not in why:
        assert time.monotonic() < deadline, why
        why = outcome_after(101.0)["why"]
    follower.leader.close()


@pytest.mark.parametrize("status", [{}, {"attempt": 2, "do": "run"}])
def test_a_supervisor_that_starts_after_a_reboot_names_it_as_the_cause(start_leader, status):
    folder = start_leader().folder  # of a new job
    assert read(folder / "log", 0)[1] == b""
    (folder / "status.json").write_text(json.dumps(status))
    start_leader()
    cause = b"launch: ROOT CAUSE a: its supervisor ended without an outcome"
    assert (cause in read(folder / "log", 0)[1]) == bool(status)


def test_the_failure_of_a_job_is_sent_to_its_webhook_and_the_address_is_in_no_log(tmp_path):
    server = Server()
    try:
        env = {"JAXTRAIN_NOTIFY_URL": server.url}
        assert supervise(tmp_path, "raise SystemExit(3)", env=env).wait(30) == 3
    finally:
        server.close()
    [alert] = server.bodies()
    assert alert["event"] == "failed" and "a rank 0" in alert["text"]
    assert alert["source"] == f"job test-{os.getpid()}"
    written = [p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()]
    assert sum(SECRET in text for text in written) == 1  # job.json


def outcome_in(folder):
    return json.loads((folder / "status.json").read_text())["outcome"]


def test_the_outcome_is_stored_even_if_the_job_filled_the_disk(disk):
    process = supervise(disk, f"{FILL}\nfill()")
    assert process.wait(20) == 0
    assert outcome_in(disk)["why"] == "done" and not (disk / "reserve").exists()


def test_a_supervisor_waits_until_there_is_room_for_the_outcome(disk):
    process = supervise(disk, f"{FILL}\nfill()\nos.unlink('reserve')\nfill()")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.5)
    assert outcome_in(disk) is None
    (disk / "fill").unlink()
    assert process.wait(20) == 0 and outcome_in(disk)["why"] == "done"


def test_processes_connect_to_an_ipv6_coordinator(tmp_path):
    program = """
import os
from jaxtrain.distributed.cluster import detect_world
from jaxtrain.distributed.runtime import join_processes
join_processes(detect_world(os.environ))
open("joined", "w").write(os.environ["JAX_COORDINATOR_ADDRESS"])
os._exit(0)
"""
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert supervise(tmp_path, program, "::1", env).wait(60) == 0
    assert (tmp_path / "joined").read_text().startswith("[::1]:")


def test_a_heartbeat_shows_the_programs_progress_even_on_a_full_disk(disk):
    program = f"""{FILL}
from jaxtrain.distributed.heartbeat import beat
beat("compile", 7)
beat("train", 8)
beat("train", 8)
fill()
beat("train", 9)
"""
    env = os.environ | {"JAXTRAIN_BEAT": str(disk / "beat"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=disk, env=env, check=True)
    record = json.loads((disk / "beat").read_text())
    assert (record["beats"], record["step"], record["phase"]) == (4, 9, "train")

"""Stops jobs on this host whose supervisor hangs, or whose disk is full."""

import contextlib
import fcntl
import os
import signal
import subprocess

import pytest
from local_client import LocalClient, begin_job
from small_disk import small_disk

from launch import stop
from launch.host import processes, stopping
from launch.host.exit_codes import STOPPED
from launch.host.files import read_json, write_json
from launch.host.keeper import KEEPER, KEEPER_ID
from launch.host.restart_policy import NOW
from launch.host.supervise import RESERVE, RESERVE_BYTES
from launch.ssh import HostError

ASKED = "the operator asked"


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        if not disk.mounted:
            pytest.skip("mounting a small disk needs root")
        yield disk


class HungJob:
    """A job of which nothing answers: `sleep` in place of its keeper, its worker and its rank.

    This process is the parent of all three, as init or a user's service manager is of a worker
    whose keeper has ended.
    """

    def __init__(self, jobs):
        self.folder = jobs / f"test-{os.getpid()}"
        self.folder.mkdir()
        self.processes = {}
        for name in ("keeper", "worker", "rank"):
            env = os.environ | ({processes.JOB_MARK: self.folder.name} if name == "rank" else {})
            self.processes[name] = subprocess.Popen(["sleep", "60"], env=env)
        self.pids = {name: process.pid for name, process in self.processes.items()}
        write_json(self.folder / KEEPER_ID, processes.identify(self.pids["keeper"]))
        status = processes.identify(self.pids["worker"]) | {"attempt": 1, "outcome": None}
        write_json(self.folder / "status.json", status)
        (self.folder / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))
        self.lock = open(self.folder / KEEPER, "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)  # the worker has it for as long as it lives

    def living(self):
        return {name for name, pid in self.pids.items() if processes.is_alive(pid)}

    def outcome(self):
        return read_json(self.folder / "status.json")["outcome"]

    def close(self):
        self.lock.close()
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr(stopping, "NOW_S", 0.3)
    monkeypatch.setattr(stopping, "ENDING_S", 0.3)
    monkeypatch.setattr(stopping, "KILL_S", 0.3)
    with contextlib.ExitStack() as stack:
        yield lambda jobs: stack.enter_context(contextlib.closing(HungJob(jobs)))


def test_an_unkillable_worker_does_not_protect_its_ranks_and_its_parent_is_spared(
    start, tmp_path, monkeypatch
):
    job, signalled = start(tmp_path), set()

    def send_signal(pid, number):
        signalled.add(pid)
        if pid in (job.pids["keeper"], job.pids["rank"]):  # the worker hangs in the kernel
            os.kill(pid, number)

    monkeypatch.setattr(processes, "send_signal", send_signal)
    for _ in range(2):
        assert stopping.stop(job.folder, NOW, kill=False) == [job.pids["worker"]]
        assert job.living() == {"worker"} and signalled == set(job.pids.values())
        assert job.outcome() == {"code": STOPPED, "why": NOW}


def test_stop_now_kills_the_job_and_stores_its_outcome_on_a_full_disk(start, disk):
    job = start(disk.path)
    disk.fill()
    assert stopping.stop(job.folder, NOW, kill=False) == [] and job.living() == set()
    assert job.outcome() == {"code": STOPPED, "why": NOW} and not (job.folder / "stop").exists()


def test_stop_now_kills_the_job_even_if_nothing_has_room_for_the_outcome(start, disk):
    job = start(disk.path)
    (job.folder / RESERVE).unlink()
    disk.fill()
    with pytest.raises(OSError, match="were killed, but its outcome was not stored .*No space"):
        stopping.stop(job.folder, NOW, kill=False)
    assert job.living() == set()


def test_a_full_disk_has_room_for_the_request_to_stop_after_a_save(start, disk):
    job = start(disk.path)
    disk.fill()
    assert stopping.stop(job.folder, ASKED, kill=False) == []
    assert (job.folder / "stop").exists() and len(job.living()) == 3


def test_stop_now_ends_a_hung_supervisor_that_has_no_ranks(start, tmp_path):
    job = start(tmp_path)
    os.kill(job.pids["rank"], signal.SIGKILL)
    assert stopping.stop(job.folder, NOW, kill=False) == [] and job.living() == set()
    assert (job.folder / "stop").read_text() == NOW


def test_a_stop_that_every_host_refuses_prints_their_reasons(tmp_path, monkeypatch, capsys):
    job = begin_job(tmp_path, monkeypatch)

    class Full(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            raise HostError(f"{host.name}: OSError: No space left on device")

    monkeypatch.setattr(stop, "connect", lambda job: Full(job.hosts))
    with pytest.raises(HostError, match="no host confirmed that the job was stopped"):
        stop.stop([job], now=True)
    assert "a: OSError: No space left" in capsys.readouterr().err

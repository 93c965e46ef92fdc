"""A job owns its run directory from its start to its end, also while none of its ranks runs."""

import errno
import fcntl
import functools
import inspect
import json
import os
import re
import socket
import sys

import pytest
from local_client import LocalClient

from jaxtrain.run_directory import liveness, lock
from jaxtrain.run_directory.liveness import JOB_VARIABLE, find_owner
from launch.host import claim as claim_lib
from launch.host import file_system, keeper
from launch.host.processes import JOB_MARK
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import PYTHON, Job
from launch.prepare import OWNER, check, judge_directories
from launch.ssh import HostError
from launch.stop import stop_request

Claim = functools.partial(claim_lib.Claim, wait_s=0.1)
DOWN = r"another of its hosts may have the lock; if that host is down, remove .*\.job"


def no_locks(file, operation):
    """Behaves like flock() on a file system without locks."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_job_that_waits_between_attempts_keeps_out_every_other_run(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    run, seen = tmp_path / "run", {}

    def start(root, **policy):
        # Its rank fails at once, so the job waits in `gather` for its next attempt.
        host = Host("h0", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / root))
        argv = [PYTHON, "-c", "raise SystemExit(1)", f"--workdir={run}"]
        record = {"argv": argv, "ranks_per_host": 1, "env": {}, "folders": {"h0": str(tmp_path)}}
        job = Job.create([host], Policy(backoff_s=300.0), "", **record)
        client = LocalClient([host])
        seen[root] = lambda: client.call(host, stop_request(job, "", kill=True))
        return job, client.call(host, job.request(host))

    first, answer = start("a")
    try:
        assert answer == {"started": True}
        owner = find_owner(run / lock.JOB_FILE)
        [keeper_pid, _] = keeper.supervisor_pids(tmp_path / "a" / "jobs" / first.id)
        assert (owner["job"], owner["pid"]) == (first.id, keeper_pid)
        who = rf"job {first.id} \(pid {keeper_pid} on {re.escape(socket.gethostname())}\)"
        with pytest.raises(HostError, match=f"{who} is running and writes to {run}"):
            start("other")  # the launcher's folder of an inventory with another `workdir`
        with pytest.raises(
            lock.RunLocked, match=f"job {first.id}.*launch.run stop {first.id}.*{DOWN}"
        ):
            lock.RunLock(run).__enter__()
        with monkeypatch.context() as patch:
            patch.setenv(JOB_VARIABLE, first.id)
            with lock.RunLock(run):  # a rank of the job itself
                pass
        host = first.hosts[0]
        check(host, {"owner": owner}, {"owner": OWNER})
        [finding] = judge_directories({host: {"workdir": str(run), "owner": owner}})
        assert f"job {first.id} (pid {keeper_pid}" in finding.problem
        assert f"if that host is down, remove .job from {run}" in finding.problem
    finally:
        seen["a"]()
    assert find_owner(run / lock.JOB_FILE) == {}  # the kernel has released the lock
    assert start("other")[1] == {"started": True}
    seen["other"]()


def test_hosts_of_a_job_share_its_claim_and_the_last_one_removes_the_file(tmp_path):
    run = tmp_path / "run"
    first, second = Claim(run, "a"), Claim(run, "a")
    first.release()
    assert find_owner(run / ".job")["job"] == "a"
    with pytest.raises(RuntimeError, match=f"job a .pid.*{DOWN}"):
        Claim(run, "b")
    second.release()
    assert not (run / ".job").exists()
    third = Claim(run, "b")
    (run / "metrics.jsonl").touch()
    third.release()
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_a_job_that_wrote_nothing_leaves_no_folder_that_it_created(tmp_path):
    Claim(tmp_path / "run", "a").release()
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    Claim(tmp_path / "run", "a").release()
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", '{"job": "a"}', "[]"])
def test_a_damaged_claim_is_replaced(tmp_path, text):
    (tmp_path / ".job").write_text(text)
    claim = Claim(tmp_path, "a")
    assert find_owner(tmp_path / ".job")["job"] == "a"
    claim.release()


def test_without_flock_a_job_of_this_host_is_alive_if_its_pid_is_and_the_log_says_so(tmp_path):
    claim = Claim(tmp_path, "a", flock=no_locks)
    with pytest.raises(RuntimeError, match="job a .pid"):
        Claim(tmp_path, "b", flock=no_locks)
    owner = json.loads((tmp_path / ".job").read_text())
    (tmp_path / ".job").write_text(json.dumps(owner | {"pid_start": "1"}))  # a reused pid
    second = Claim(tmp_path, "b", flock=no_locks)
    assert "cannot be locked" in second.gap
    for ended in (claim, second):
        ended.release()
    assert not (tmp_path / ".job").exists()


@pytest.mark.parametrize("flock", [no_locks, fcntl.flock])
def test_where_hosts_share_no_lock_the_claim_of_a_job_elsewhere_stays(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(claim_lib, "locks_this_host_only", lambda folder: "9p")
    monkeypatch.setattr(claim_lib, "Claim", functools.partial(Claim, flock=flock))
    first = Claim(tmp_path, "a", flock=flock)
    path, spec = tmp_path / ".job", {"id": "b", "run_directory": str(tmp_path)}
    owner, boot = json.loads(path.read_text()), claim_lib._boot().split()[0]
    path.write_text(json.dumps(owner | {"job": "c"}))  # two starts at once on two hosts
    first.sign()
    first.release()
    assert claim_lib.read_owner(path)["job"] == "c"
    for elsewhere in ({"host": "gpu7", "boot": "x y"}, {"boot": f"{boot} pid:[1]"}):
        path.write_text(json.dumps(owner | elsewhere))
        before = path.read_text()
        assert claim_lib.claim_run_directory(spec) is None
        assert f"{path} names job a (pid" in spec["unclaimed"]
        assert "which may be running" in spec["unclaimed"] and path.read_text() == before
    path.write_text(json.dumps(owner | {"boot": "x y"}))  # this host, before it was rebooted
    second = claim_lib.claim_run_directory(spec)
    assert "between attempts, jobs on other hosts can write there" in spec["unclaimed"]
    second.release()
    assert not path.exists()


def test_a_lock_of_this_host_only_is_shared_on_this_host(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_lib, "locks_this_host_only", lambda folder: "9p")
    first, second = Claim(tmp_path, "a"), Claim(tmp_path, "a")
    first.release()
    assert first.gap.startswith("9p does not lock") and first.gap == second.gap
    with pytest.raises(RuntimeError, match="job a .* is running"):
        Claim(tmp_path, "b")
    second.release()
    assert not (tmp_path / ".job").exists()


def test_the_launcher_and_the_trainer_have_the_same_rules_for_the_same_files(tmp_path):
    for name in ("THIS_HOST_ONLY", "LOCAL_OPTIONS"):
        assert getattr(file_system, name) == getattr(liveness, name)
    assert (claim_lib.JOB_FILE, JOB_MARK) == (lock.JOB_FILE, JOB_VARIABLE)
    assert claim_lib.NO_FLOCK == lock.NO_FLOCK
    launchers, trainers = file_system.locks_this_host_only, liveness.locks_this_host_only
    assert inspect.getsource(launchers) == inspect.getsource(trainers)
    owner = liveness.describe_this_process("run", 7)
    (tmp_path / ".lock").write_text(json.dumps(owner))
    assert claim_lib.read_owner(tmp_path / ".lock") == owner
    assert claim_lib._boot() == owner["boot"] and claim_lib._is_alive(owner)


@pytest.mark.parametrize("name", [".job", ".lock"])
def test_a_full_disk_does_not_remove_a_newer_lock_file_of_another_run(tmp_path, monkeypatch, name):
    path = tmp_path / name

    def write(*args):
        path.unlink()  # by the last owner, as it ends
        path.write_text("new")
        return 0

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises((OSError, ValueError), match="No space left"):
        Claim(tmp_path, "a") if name == ".job" else lock.RunLock(tmp_path).__enter__()
    assert path.read_text() == "new"


def test_a_directory_that_cannot_be_claimed_is_reported_and_not_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    spec = {"id": "a", "run_directory": str(tmp_path / "file" / "run")}
    assert claim_lib.claim_run_directory(spec) is None
    assert "Not a directory" in spec["unclaimed"] and "between attempts" in spec["unclaimed"]
    monkeypatch.setattr(os, "pwrite", lambda *args: 0)  # a full disk
    spec["run_directory"] = str(tmp_path / "run")
    assert claim_lib.claim_run_directory(spec) is None
    assert "No space left" in spec["unclaimed"] and not (tmp_path / "run" / ".job").exists()

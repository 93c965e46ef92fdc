"""A job owns its run directory from its start to its end, also while none of its ranks runs."""

import errno
import functools
import json
import os
import re
import socket
import sys

import pytest
from local_client import LocalClient

from jaxtrain.run_directory import lock
from jaxtrain.run_directory.liveness import JOB_VARIABLE, find_owner
from launch.host import claim as claim_lib
from launch.host import keeper
from launch.host.processes import JOB_MARK
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import PYTHON, Job
from launch.prepare import OWNER, check, judge_directories
from launch.ssh import HostError
from launch.stop import stop_request

Claim = functools.partial(claim_lib.Claim, wait_s=0.1)


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
        with pytest.raises(lock.RunLocked, match=f"job {first.id}.*launch.run stop {first.id}"):
            lock.RunLock(run).__enter__()
        with monkeypatch.context() as patch:
            patch.setenv(JOB_VARIABLE, first.id)
            with lock.RunLock(run):  # a rank of the job itself
                pass
        host = first.hosts[0]
        check(host, {"owner": owner}, {"owner": OWNER})
        [finding] = judge_directories({host: {"workdir": str(run), "owner": owner}})
        assert f"job {first.id} (pid {keeper_pid}" in finding.problem
    finally:
        seen["a"]()
    assert find_owner(run / lock.JOB_FILE) == {}  # the kernel has released the lock
    assert start("other")[1] == {"started": True}
    seen["other"]()


def test_hosts_of_a_job_share_its_claim_and_the_last_one_removes_the_file(tmp_path):
    assert (claim_lib.JOB_FILE, JOB_MARK) == (lock.JOB_FILE, JOB_VARIABLE)
    run = tmp_path / "run"
    first, second = Claim(run, "a"), Claim(run, "a")
    first.release()
    assert find_owner(run / ".job")["job"] == "a"
    with pytest.raises(RuntimeError, match="job a .pid"):
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


def test_a_directory_that_cannot_be_claimed_is_reported_and_not_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    spec = {"id": "a", "run_directory": str(tmp_path / "file" / "run")}
    assert claim_lib.claim_run_directory(spec) is None
    assert "Not a directory" in spec["unclaimed"] and "between attempts" in spec["unclaimed"]
    monkeypatch.setattr(os, "pwrite", lambda *args: 0)  # a full disk
    spec["run_directory"] = str(tmp_path / "run")
    assert claim_lib.claim_run_directory(spec) is None
    assert "No space left" in spec["unclaimed"] and not (tmp_path / "run" / ".job").exists()

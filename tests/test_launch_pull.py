import base64
import json
import shutil
import sys
import threading
import time

import pytest
from local_client import LocalClient
from run_directories import series, write_run

from launch import pull, summary
from launch.host.log import TAIL_BYTES
from launch.host.restart_policy import Policy
from launch.host.run_files import read_changes
from launch.inventory import Host
from launch.job import Job
from launch.pull import RunCopy
from launch.report.figures import progress
from launch.report.run_folder import NoRun, read_run
from launch.ssh import HostError


def test_following_a_failed_job_ends_even_if_its_run_has_no_summary(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    run = write_run(tmp_path / "run", series(60))
    (run / "summary.json").unlink(missing_ok=True)
    host = Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / "host"))
    record = {"argv": [f"--config.workdir={run}"], "env": {}, "ranks_per_host": 1}
    job = Job.create([host], Policy(), "", **record, folders={})
    host_folder = tmp_path / "host" / "jobs" / job.id
    host_folder.mkdir(parents=True)
    status = {"outcome": {"code": 1, "why": "an error"}}
    (host_folder / "status.json").write_text(json.dumps(status))
    source = RunCopy(job.id)
    source.client = LocalClient(job.hosts)
    args = summary.parse([job.id, "--follow", "--every=0.1"])
    following = threading.Thread(target=summary.follow, args=(args, [source]), daemon=True)
    following.start()
    following.join(20)
    assert not following.is_alive()
    shutil.rmtree(run)  # as if it had failed before it wrote anything
    shutil.rmtree(source.folder)
    source = RunCopy(job.id)
    source.client = LocalClient(job.hosts)
    with pytest.raises(NoRun):
        summary.follow(args, [source])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.sh": (0, b"")}, "not of a run: 'x.sh'"),
        ({"config.json": (1, b"x")}, "sent byte 1 of config.json after byte 0"),
        ({"config.json": (-1, b"x")}, "sent byte -1"),
        ({f"hosts/{i}.jsonl": (0, b"") for i in range(5)}, "at most 4 files"),
        ({"metrics.jsonl": (0, b"")}, "announced more"),
        ({"metrics.jsonl": (0, b"xy")}, "sent more than 64 bytes at once"),
        ({"metrics.jsonl": ("0", b"")}, "have no meaning"),
    ],
)
def test_what_a_host_sends_is_bounded(tmp_path, monkeypatch, files, message):
    monkeypatch.setattr(pull, "MOST_FILES", 4)
    monkeypatch.setattr(pull, "MOST_BYTES", 64)
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    host = Host("a", "127.0.0.1")
    record = {"argv": ["--config.workdir=x"], "env": {}, "ranks_per_host": 1}
    source = RunCopy(Job.create([host], Policy(), "", **record, folders={}).id)

    class Hostile(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            parts = {
                name: {"inode": 1, "at": at, "base64": base64.b64encode(data).decode(), "tail": 0}
                for name, (at, data) in files.items()
            }
            return {"more": True, "over": True, "time": 1.7e9, "files": parts}

    source.client = Hostile([host])
    with pytest.raises(HostError, match=message):
        source.fetch()


@pytest.mark.parametrize("skew_s", [0.0, -600.0, 600.0])
def test_the_state_of_a_job_does_not_depend_on_its_hosts_clock(tmp_path, monkeypatch, skew_s):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    host, run, clock = Host("a", "127.0.0.1"), write_run(tmp_path / "run", series(60)), time.time
    (run / "summary.json").unlink()
    record = {"argv": [f"--config.workdir={run}"], "env": {}, "ranks_per_host": 1}
    source = RunCopy(Job.create([host], Policy(), "", **record, folders={}).id)

    class Skewed(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda: clock() + skew_s)
                return {"over": False} | read_changes(run, request["have"], request["skip"])

    source.client = Skewed([host])
    for age_s, state in ((200.0, "silent for 3 min 2"), (1.0, "running")):
        with open(run / "metrics.jsonl", "a") as file:
            line = {"step": 61, "time": clock() + skew_s - age_s, "train/loss_nats": 3.0}
            file.write(json.dumps(line) + "\n")
        found = read_run(source.fetch())
        assert found.state.startswith(state) and ("left" in progress(found)) == (age_s < 60)


@pytest.mark.parametrize("time_s", [None, "now", float("nan"), 1e400, -1.0])
def test_a_hosts_clock_that_has_no_meaning_is_refused(time_s):
    with pytest.raises(HostError, match="have no meaning"):
        pull._check_answer(
            Host("a", "127.0.0.1"), {"more": False, "over": False, "files": {}, "time": time_s}
        )


def test_a_run_of_more_bytes_than_any_real_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    host = Host("a", "127.0.0.1")
    record = {"argv": ["--config.workdir=x"], "env": {}, "ranks_per_host": 1}
    source = RunCopy(Job.create([host], Policy(), "", **record, folders={}).id)
    held = {"metrics.jsonl": [1, 8 << 30, 0]}
    with pytest.raises(HostError, match="at most 4,100 files and 8,589,934,592 bytes"):
        source._check(host, held, "metrics.jsonl", 8 << 30, b"x")


def test_a_file_that_was_replaced_is_copied_whole_even_if_its_inode_is_the_same(
    tmp_path, monkeypatch
):
    """File systems reuse inodes; here each file is rewritten in place, which keeps its inode."""
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    host = Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / "host"))
    run = tmp_path / "run"
    record = {"argv": [f"--config.workdir={run}"], "env": {}, "ranks_per_host": 1}
    source = RunCopy(Job.create([host], Policy(), "", **record, folders={}).id)

    class Direct(LocalClient):
        def call(self, host, request, timeout_s=60.0):
            return {"over": False} | read_changes(run, request["have"], request["skip"])

    source.client = Direct([host])
    (run / "hosts").mkdir(parents=True)
    end = '"end": 1}' + " " * TAIL_BYTES  # the same in both
    for number in (1, 2):
        written = {"metrics.jsonl": f'{{"step": {number}}}\n' * 100 * number}
        written["hosts/0.jsonl"] = f'{{"step": {number}}}\n' * 100  # of the same length
        written["summary.json"] = f'{{"state": {number}, {end}'
        for name, text in written.items():
            (run / name).write_text(text)
        source.fetch()
        assert {name: (source.folder / name).read_text() for name in written} == written

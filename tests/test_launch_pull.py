import json
import shutil
import sys
import threading

import pytest
from local_client import LocalClient
from run_directories import series, write_run

from launch import summary
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import Job
from launch.pull import RunCopy
from launch.report.run_folder import NoRun


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

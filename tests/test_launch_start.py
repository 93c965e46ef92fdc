"""Continues one site of a job at two sites: what the job's name and NAME.SITE then lead to."""

import contextlib
import time
from pathlib import Path

import pytest

from launch import operate, run, start
from launch.host.exit_codes import STOPPED
from launch.host.files import write_json
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import Job, read_jobs, replace_in_parent, write_parent
from launch.ssh import HostError, SshClient
from launch.sync_code import Code

ENDED = {"known": True, "alive": False, "processes": []}
ANSWERS = {"status": ENDED, "stop": {"known": True, "left": []}, "start": {"started": True}}


class Monitor(contextlib.nullcontext):
    """Stands in for launch.follow.JobMonitor: each job has ended with success."""

    def __init__(self, client, job, *options):
        super().__init__(self)
        self.client, self.job = client, job

    def print_new(self, wait_s):
        return {"code": 0, "why": f"{self.job.id} is done"}


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Records of `two.west` and `two.east`, which have begun. The list of stopped jobs."""
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    monkeypatch.setattr(operate, "JobMonitor", Monitor)
    monkeypatch.setattr(start, "read_code", lambda tree: Code(Path(), [], "hash", "commit", ""))
    stopped = []

    def call(client, host, request, timeout_s=60.0):
        if request["op"] == "stop":
            stopped.append(request["job"])
        return ANSWERS[request["op"]]

    monkeypatch.setattr(SshClient, "call", call)
    record = {"argv": [], "ranks_per_host": 1, "parent": "two", "tree": "", "folders": {}}
    record |= dict.fromkeys(start.RESUMED, "") | {"env": {}, "sites": {}}
    for site in ("west", "east"):
        host = Host(site[0], "127.0.0.1")
        Job.create([host], Policy(), "", f"two.{site}", **record, site=site, begun=time.time())
    write_parent("two", {site: f"two.{site}" for site in ("west", "east")})
    return stopped


def ids(name, **options):
    return [job.id for job in read_jobs(name, **options)]


def continue_east(of="two.east", **record):
    """Records a job that continues another one of the site east, and has not begun."""
    old = Job(of)
    copied = {name: value for name, value in old.record.items() if name != "begun"}
    for name in ("hosts", "policy", "ssh_config", "token", "port"):
        del copied[name]
    new = Job.create(old.hosts, Policy(), "", **copied | {"resumes": of} | record)
    replace_in_parent(new)
    return new


def test_a_failed_resume_of_a_site_leaves_its_former_job_in_place(two, monkeypatch, capsys):
    def refuse(*args, **options):
        west, created, east = ids("two", starting=True)
        assert (west, east) == ("two.west", "two.east")
        new.append(Job(created))
        raise HostError("h: the disk is full")

    new = []
    monkeypatch.setattr(start, "preflight", refuse)
    for _ in range(2):  # the second one is not refused because of the first
        assert run.main(["resume", "two.east"]) == 1
        assert "the disk is full" in capsys.readouterr().err
        assert ids("two") == ["two.west", "two.east"] and ids("two.east") == ["two.east"]
    for verb in ("attach", "logs"):
        assert run.main([verb, "two"]) == 0
        err = capsys.readouterr().err
        assert "two.west is done" in err and "two.east is done" in err
    assert run.main(["status"]) == 0
    assert f"{new[1].id}  e  never started: h: the disk is full" in capsys.readouterr().out
    assert run.main(["stop", "two"]) == 0 and two == ["two.west", "two.east"]
    assert ids("two", starting=True) == ["two.west", "two.east"]


def test_a_resume_that_a_host_refuses_does_not_hide_the_one_that_runs(two, monkeypatch, capsys):
    calls, refusal = SshClient.call, "h: job two.east was resumed as another, which is running"
    started = []

    def make_ready(clients, code):  # another terminal resumes the same job meanwhile
        started.append(clients[0][1].id)
        clients[0][1].change(folders={"e": "/code"})
        if len(started) == 1:
            assert run.main(["resume", "two.east"]) == 1

    def call(client, host, request, timeout_s=60.0):
        if request["op"] == "start" and request["job"] != started[0]:
            raise HostError(refusal)
        return calls(client, host, request)

    monkeypatch.setattr(start, "_make_ready", make_ready)
    monkeypatch.setattr(SshClient, "call", call)
    assert run.main(["resume", "two.east"]) == 0
    running, refused = started
    assert two == [refused]  # what had started of it was killed
    for name in ("two.east", running):
        assert ids(name) == ids(name, starting=True) == [running]
    assert ids("two", starting=True) == ["two.west", running] and ids(refused) == [refused]
    assert run.main(["attach", refused]) == 1 and refusal in capsys.readouterr().err
    monkeypatch.setattr(SshClient, "call", calls)
    for name, newest in (("two.east", 2), (refused, 3)):  # also the refused one can be resumed
        assert run.main(["resume", name]) == 0
        assert ids("two.east") == ids(name) == [started[newest]]


def test_logs_with_exact_shows_a_job_that_was_continued(two, capsys):
    newest = continue_east(begun=1.0)
    assert run.main(["logs", "two.east"]) == 0
    err = capsys.readouterr().err
    assert f"{newest.id} is done" in err and "logs --exact two.east` shows" in err
    for name in ("two.east", newest.id):
        assert run.main(["logs", "--exact", name]) == 0
        err = capsys.readouterr().err
        assert f"{name} is done" in err and "continued" not in err
    assert run.main(["logs", "--exact", "two"]) == 0
    assert f"{newest.id} is done" in capsys.readouterr().err


def test_a_stop_ends_a_resume_that_is_checking_the_hosts(two, monkeypatch, capsys):
    monkeypatch.setattr(
        start, "preflight", lambda *args, **options: run.main(["stop", "two"]) or []
    )
    assert run.main(["resume", "two.east"]) == STOPPED
    assert "was stopped before it ran" in capsys.readouterr().err


def test_the_name_of_a_site_leads_to_its_current_job(two, capsys):
    first = continue_east(begun=1.0)
    second = continue_east(first.id, begun=2.0)
    failed = continue_east(second.id)
    newest = continue_east(second.id, begun=3.0)
    for name in ("two.east", first.id, second.id):
        assert run.main(["stop", name]) == 0
        assert f"{name} was continued as {newest.id}" in capsys.readouterr().err
    assert two == 3 * [newest.id]
    assert run.main(["stop", "two"]) == 0 and two[3:] == ["two.west", newest.id]
    assert ids(failed.id) == [failed.id] and ids(newest.id) == [newest.id]
    assert "continued" not in capsys.readouterr().err
    assert run.main(["status"]) == 0  # lists each job by its own name
    out = capsys.readouterr().out
    assert "two.east  e  running" in out and f"two  stands for two.west {newest.id}\n" in out


def test_commands_for_a_job_that_was_resumed_as_another_name_that_one(two, monkeypatch, capsys):
    monkeypatch.setattr(start, "begin", lambda jobs, *options: 0)
    assert run.main(["resume", "two"]) == 0
    later = Job("two.west").record["continued_as"]
    assert run.main(["stop", "two"]) == 0 and "continued as" not in capsys.readouterr().err
    for job in read_jobs(later):  # it has begun
        job.change(begun=time.time())
    assert run.main(["stop", "two"]) == 0
    assert capsys.readouterr().err.count(f"two was continued as {later}") == 1
    assert two == 2 * ["two.west", "two.east"]


def test_a_job_that_an_earlier_version_recorded_is_not_resumed_and_says_what_to_do(two, capsys):
    job = Job("two.east")
    del job.record["env_extras"]
    write_json(job.folder / "job.json", job.record)
    for name in ("two", "two.east"):
        assert run.main(["resume", name]) == 1
        err = capsys.readouterr().err
        assert "two.east must have a record of this version" in err and "env_extras" in err
    assert run.main(["attach", "two"]) == 0


def test_a_site_that_never_started_does_not_keep_another_from_being_followed(two, capsys):
    Job("two.east").change(begun=None)
    assert run.main(["attach", "two"]) == 1  # as if it could not be followed
    err = capsys.readouterr().err
    assert "two.west is done" in err and "launch.run resume two.east` starts" in err
    Job("two.west").change(begun=None)
    assert run.main(["attach", "two"]) == 1
    assert "launch.run resume two` starts its command" in capsys.readouterr().err

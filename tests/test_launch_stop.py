"""Stops jobs that are starting or whose hosts do not answer, and answers the Ctrl-C prompt."""

import contextlib
import io
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from launch import operate, run, start, stop
from launch.host import requests
from launch.host.exit_codes import INTERRUPTED, STOPPED
from launch.host.restart_policy import Policy
from launch.inventory import Host
from launch.job import Job, write_parent
from launch.ssh import HostError, SshClient
from launch.sync_code import Code

KNOWN = {"known": True, "left": []}
CODE = Code(Path(), [], "hash", "commit", "")


class Hosts:
    """Answers requests in place of all hosts; `asked` is [(host's name, operation)]."""

    def __init__(self):
        self.asked, self.answers = [], {"detach": {}, "stop": KNOWN, "start": {"started": True}}

    def call(self, client, host, request, timeout_s=60.0):
        self.asked.append((host.name, request["op"]))
        answer = self.answers[request["op"]]
        return answer(host, request) if callable(answer) else answer


@pytest.fixture
def hosts(monkeypatch):
    hosts = Hosts()
    call = lambda *arguments, **named: hosts.call(*arguments, **named)
    monkeypatch.setattr(SshClient, "call", call)
    return hosts


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Two jobs that have not begun, `two.west` on host w and `two.east` on host e."""
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    record = {"argv": [], "env": {}, "ranks_per_host": 1, "parent": "two"}
    jobs = []
    for site in ("west", "east"):
        host = Host(site[0], "127.0.0.1")
        record |= {"site": site, "folders": {host.name: ""}}
        jobs.append(Job.create([host], Policy(), "", f"two.{site}", **record, sites={}))
    write_parent("two", {job.record["site"]: job.id for job in jobs})
    return jobs


def test_a_job_that_is_stopped_while_its_hosts_are_prepared_does_not_start(
    jobs, hosts, monkeypatch, capsys
):
    hosts.answers["stop"] = {"known": False, "left": []}
    monkeypatch.setattr(start, "_make_ready", lambda *_: run.main(["stop", "two.east"]))
    assert start.begin(jobs, CODE, as_json=False, detach=True) == STOPPED
    err = capsys.readouterr().err
    assert "e: job two.east is not there" in err and "job two.east has not started." in err
    assert "job two.east was stopped before it ran: the operator asked" in err
    assert hosts.asked == [("e", "stop")]
    for job in jobs:
        assert Job(job.id).record["outcome"]["code"] == STOPPED


def test_a_job_that_is_stopped_while_its_supervisors_start_is_killed_everywhere(jobs, hosts):
    def stop_elsewhere(host, request):
        if host.name == "e":
            hosts.answers["stop"] = {"known": False, "left": []}
            assert stop.stop([Job("two.west"), Job("two.east")], now=True) == 0
            hosts.answers["stop"] = lambda host, request: KNOWN if request["kill"] else {}
        return {"started": True}

    hosts.answers["start"] = stop_elsewhere
    jobs = [Job(job.id) for job in jobs]
    with pytest.raises(start.StoppedError, match="two.west was stopped before it ran"):
        start._start_supervisors([(stop.connect(job), job) for job in jobs])
    assert hosts.asked[-2:] == [("w", "stop"), ("e", "stop")]
    assert "was stopped before" in Job("two.east").record["outcome"]["why"]


def test_processes_that_survive_are_reported_also_after_a_start_that_failed(jobs, hosts, capsys):
    def refuse(host, request):
        raise HostError(f"{host.name}: refused")

    hosts.answers |= {"stop": {"known": True, "left": [7, 8]}, "start": refuse}
    assert run.main(["stop", "two", "--now"]) == 1
    assert "error: w: pids 7 8 of job two.west cannot be killed" in capsys.readouterr().err
    for job in jobs:
        job.change(stopped="")
    with pytest.raises(HostError, match="w: refused"):
        start._start_supervisors([(stop.connect(job), job) for job in jobs])
    assert "launch: e: pids 7 8 of job two.east cannot be killed" in capsys.readouterr().err


def test_a_host_whose_answer_has_no_meaning_has_not_stopped_the_job(jobs, hosts, capsys):
    for answer in ([], {"known": True}, {"known": True, "left": "x"}):
        hosts.answers["stop"] = answer
        assert run.main(["stop", "two.east"]) == 1
        assert "e: its answer" in capsys.readouterr().err


class Watch(contextlib.nullcontext):
    """Stands for a JobMonitor: raises what `turns` contains, or returns it as the outcome."""

    turns = []

    def __init__(self, client, job, *_):
        super().__init__(self)
        self.client, self.job = client, job

    def print_new(self, wait_s):
        turn = self.turns.pop(0)
        if turn is KeyboardInterrupt:
            raise turn
        return turn


@pytest.fixture
def type_at_prompt(jobs, hosts, monkeypatch):
    """Follows both jobs; each Ctrl-C is answered by the next key. Returns the exit status."""
    monkeypatch.setattr(operate, "JobMonitor", Watch)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    for job in jobs:
        job.change(begun=1.0)
    hosts.answers["status"] = {"processes": []}

    def follow(keys, *turns):
        keys, Watch.turns = list(keys), list(turns)
        monkeypatch.setattr("builtins.input", lambda _: keys.pop(0))
        return operate.follow([Job(job.id) for job in jobs], as_json=False)

    return follow


@pytest.mark.parametrize(("key", "op"), [("d", "detach"), ("s", "stop")])
def test_a_request_that_fails_after_ctrl_c_is_reported_and_the_jobs_are_still_followed(
    type_at_prompt, hosts, capsys, key, op
):
    def fail(host, request):
        os.kill(os.getpid(), signal.SIGINT)  # a further Ctrl-C does not cut it short
        if host.name == "w":
            raise HostError("w: its connection broke")
        return KNOWN

    hosts.answers[op] = fail
    ended = {"code": 3, "why": "failed"}
    assert type_at_prompt(key, KeyboardInterrupt, ended, ended) == 3
    err = capsys.readouterr().err
    assert "error: two.west: no host confirmed that the job was" in err and "still followed" in err
    assert ("e", op) in hosts.asked  # all the same
    hosts.answers[op] = KNOWN
    hosts.asked.clear()
    ended |= {"code": 0}
    assert type_at_prompt("d", ended, KeyboardInterrupt) == 0
    assert ("e", "detach") in hosts.asked and ("w", "detach") not in hosts.asked  # it has ended
    assert "attach two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "text"), [("stop", "not have been asked to stop. Run it again"), ("status", "")]
)
def test_ctrl_c_in_a_command_for_a_running_job_says_nothing_of_its_start(
    jobs, hosts, capsys, verb, text
):
    def interrupt(host, request):
        raise KeyboardInterrupt

    hosts.answers |= {"stop": interrupt, "status": interrupt}
    assert run.main([verb, "two.east"]) == INTERRUPTED
    err = capsys.readouterr().err
    assert "before" not in err and text in err and "interrupted" in err


def test_a_start_that_a_host_receives_after_the_kill_starts_nothing(tmp_path):
    request = {"workdir": str(tmp_path), "job": "j", "why": "not all hosts started", "kill": True}
    assert requests.stop(request) == {"known": False, "left": []}
    assert requests.start(request | {"spec": {}}) == {"started": False}


def test_a_kill_waits_for_a_start_that_is_under_way(tmp_path):
    request = {"workdir": str(tmp_path), "job": "j", "why": "not all hosts started", "kill": True}
    kill = threading.Thread(target=requests.stop, args=(request,))
    with requests.start_lock(request):
        kill.start()
        kill.join(0.3)
        assert kill.is_alive() and not (tmp_path / "jobs" / "j" / "status.json").exists()
    kill.join(10)
    assert (tmp_path / "jobs" / "j" / "status.json").exists()

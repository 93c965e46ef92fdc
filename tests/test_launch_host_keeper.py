"""A supervisor that is stopped or hangs neither hides its job nor protects it."""

import contextlib
import json
import os
import signal
import sys
import time

import pytest
from local_client import LocalClient
from quick_hosts import quick_hosts

from launch import operate, stop
from launch.host import processes, requests
from launch.host.exit_codes import STOPPED
from launch.host.restart_policy import NOW, Policy
from launch.inventory import Host
from launch.job import PYTHON, Job


class Running:
    """A job on this machine whose supervisor is stopped by SIGSTOP: the worker, not its keeper.

    Args:
        hangs: the worker hangs instead, in the reading of a file.
    """

    def __init__(self, tmp_path, hangs=False, **policy):
        host = Host("a", "127.0.0.1", python=sys.executable, workdir=str(tmp_path / "host"))
        argv = [PYTHON, "-c", "import time; time.sleep(60)"]
        record = {"argv": argv, "ranks_per_host": 1, "env": {}, "folders": {"a": str(tmp_path)}}
        self.job = Job.create([host], Policy(restarts=0, **policy), "", **record)
        self.client, self.host = LocalClient([host]), host
        self.folder = tmp_path / "host" / "jobs" / self.job.id
        assert self.client.call(host, self.job.request(host)) == {"started": True}
        self.wait(lambda: processes.marked(self.job.id))
        self.worker, self.pipe = self.status()["pid"], None
        if not hangs:
            os.kill(self.worker, signal.SIGSTOP)
            return
        os.mkfifo(self.folder / "stop")  # reading it waits for what this process never writes
        self.wait(self.open_pipe)
        (self.folder / "stop").unlink()  # or the next worker would hang, too

    def open_pipe(self):
        """Returns whether the worker reads the pipe; only then this process can open it."""
        with contextlib.suppress(OSError):
            self.pipe = os.open(self.folder / "stop", os.O_WRONLY | os.O_NONBLOCK)
        return self.pipe is not None

    def wait(self, condition, limit_s=20.0):
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def log(self):
        return "".join(path.read_text() for path in sorted((self.folder / "log").iterdir()))

    def status(self):
        return json.loads((self.folder / "status.json").read_text())


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_JOBS", str(tmp_path / "jobs"))
    started = []
    with quick_hosts(ranks={"MARGIN_S": 0.5}, stopping={"NOW_S": 0.5}):
        yield lambda **policy: started.append(Running(tmp_path, **policy)) or started[-1]
    for running in started:
        request = stop.stop_request(running.job, "the test is over", kill=True)
        running.client.call(running.host, request)
        if running.pipe is not None:
            os.close(running.pipe)


def test_stop_now_kills_the_ranks_of_a_stopped_supervisor_and_status_names_it(
    start, monkeypatch, capsys
):
    for module in (operate, stop):
        monkeypatch.setattr(module, "connect", lambda job: LocalClient(job.hosts))
    running = start()
    running.wait(lambda: processes.read_stat(running.worker).state == "T")
    operate.status([running.job], as_json=False)
    assert "STOPPED" in (shown := capsys.readouterr().out) and "has stopped its supervisor" in shown
    assert stop.stop([running.job], now=True) == 0
    assert not processes.marked(running.job.id) and not processes.is_alive(running.worker)
    assert running.status()["outcome"] == {"code": STOPPED, "why": NOW}
    assert not requests.has_supervisor(running.folder)


def test_a_supervisor_that_stays_stopped_is_replaced_and_its_ranks_end(start):
    running = start(stopped_s=1.0)
    [rank] = processes.marked(running.job.id)
    running.wait(lambda: not processes.is_alive(running.worker))
    running.wait(lambda: running.status()["attempt"] == 2)
    assert not processes.is_alive(rank)
    cause = "ROOT CAUSE a: its supervisor was stopped by a signal for over 1 s, so it was killed"
    assert cause in running.log()


def test_a_supervisor_that_hangs_is_replaced_and_its_stack_is_stored(start):
    running = start(hangs=True, stopped_s=1.0)
    [rank] = processes.marked(running.job.id)
    running.wait(lambda: running.status()["attempt"] == 2)
    assert not processes.is_alive(rank)
    cause = "ROOT CAUSE a: its supervisor hung for 2 s, so it was killed; its stack is in"
    assert cause in running.log()
    assert "in _stop_reason" in (running.folder / "supervisor.err").read_text()


def test_ranks_end_by_themselves_while_the_whole_supervisor_is_stopped(start):
    running = start(stopped_s=1.0)
    keeper = processes.read_stat(running.worker).parent
    os.kill(keeper, signal.SIGSTOP)
    [rank] = processes.marked(running.job.id)
    running.wait(lambda: not processes.is_alive(rank))
    assert processes.read_stat(running.worker).state == "T"
    for pid in (running.worker, keeper):
        os.kill(pid, signal.SIGCONT)
    running.wait(lambda: running.status()["outcome"])
    assert "a: its supervisor did not run for" in running.status()["outcome"]["why"]

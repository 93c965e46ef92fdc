"""The watcher beside a supervisor's ranks is itself replaced if it is killed or stopped."""

import os
import signal
import subprocess
import time

import pytest

from launch.host import watcher


def wait_until(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "problem"),
    [(signal.SIGKILL, "has ended"), (signal.SIGSTOP, "is stopped by a signal")],
)
def test_a_watcher_that_a_signal_ends_or_stops_is_replaced_and_still_ends_the_ranks(
    monkeypatch, number, problem
):
    monkeypatch.setattr(watcher, "RETRY_S", 0.5)
    lines, mark = [], f"JAXTRAIN_ATTEMPT=test/1/{os.getpid()}"
    name, _, value = mark.partition("=")
    rank = subprocess.Popen(["sleep", "60"], env=os.environ | {name: value})
    beside = watcher.Watcher(1.0, lines.append)
    beside.show_life()
    assert beside.pid is None  # before the first attempt there is nothing to watch
    beside.start(mark)
    try:
        first = beside.pid
        os.kill(first, number)
        wait_until(lambda: beside.show_life() or beside.pid != first)
        assert lines == [f"the watcher of this supervisor {problem}: starting another one"]
        assert rank.poll() is None and not os.path.exists(f"/proc/{first}")
        wait_until(lambda: rank.poll() is not None)  # as nothing shows it that this process runs
        assert rank.returncode == -signal.SIGKILL
    finally:
        beside.end()
        rank.kill()
        rank.wait()
    beside.show_life()
    assert beside.pid is None and len(lines) == 1

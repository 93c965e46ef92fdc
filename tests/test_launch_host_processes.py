import os
import subprocess
import sys
import time

from launch.host import processes


def test_processes_that_left_their_session_and_parent_are_found_and_killed():
    program = "import os, time\nif os.fork() == 0:\n os.setsid()\n os.fork()\ntime.sleep(100)"
    env = os.environ | {processes.JOB_MARK: "test-tree"}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env)
    deadline = time.monotonic() + 10
    while len(processes.marked("test-tree")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(processes.marked("test-tree")) == 3
    parent.kill()
    parent.wait()
    assert len(processes.marked("test-tree")) == 2  # orphans
    assert processes.kill_all(lambda: processes.marked("test-tree"), patience_s=10) == []
    assert processes.marked("test-tree") == []

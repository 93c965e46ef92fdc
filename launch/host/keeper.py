"""Keeps a job's supervisor running on a host.

A supervisor is two processes. The keeper only waits; the worker, its child, runs the job. If the
worker is killed, its children become the keeper's, which kills them and starts another worker.
"""

import fcntl
import math
import os
import signal
import time
import traceback
from pathlib import Path

from launch.host import processes
from launch.host.exit_codes import WORKER_FAILED
from launch.host.files import read_json
from launch.host.restart_policy import Policy
from launch.host.supervise import Supervisor

KEEPER = "keeper"  # file that the keeper and its worker keep locked
WORKERS = 5  # workers that a keeper starts; a host that kills this many is unfit for the job
STOPPED_POLL_S = 0.2


def keep(folder: Path) -> int:
    """Runs the keeper: starts workers until one brings the job to its end.

    Returns:
        0, or the exit status of the last worker.
    """
    processes.adopt_orphans()
    stopped_s = Policy(**read_json(folder / "job.json")["policy"]).stopped_s
    code = WORKER_FAILED
    for life in range(WORKERS):
        worker = os.fork()
        if worker == 0:
            os._exit(_work(folder, orphaned=life > 0))
        code = _wait_for(worker, stopped_s)
        processes.kill_all(lambda: processes.descendants(os.getpid()))
        if code == 0:
            break
    return code


def _wait_for(worker: int, stopped_s: float) -> int:
    """Returns the worker's exit status; kills it if a signal has stopped it for stopped_s.

    A stopped worker neither reports nor obeys, while its ranks go on. Killing it ends them, and
    the next worker reports what happened.
    """
    stopped_at = math.inf
    while True:
        is_stopped = stopped_at < math.inf
        options = os.WUNTRACED | os.WCONTINUED | (os.WNOHANG if is_stopped else 0)
        pid, status = os.waitpid(-1, options)  # also reaps the orphans of a killed worker
        if pid == worker and os.WIFSTOPPED(status):
            stopped_at = time.monotonic()
        elif pid == worker and os.WIFCONTINUED(status):
            stopped_at = math.inf
        elif pid == worker:
            return processes.exit_status(status)
        elif is_stopped and time.monotonic() - stopped_at > stopped_s:
            processes.send_signal(worker, signal.SIGKILL)
            stopped_at = math.inf
        elif is_stopped and not pid:
            time.sleep(STOPPED_POLL_S)


def _work(folder: Path, orphaned: bool) -> int:
    processes.die_with_parent(signal.SIGKILL)
    processes.adopt_orphans()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        Supervisor(folder, orphaned).run()
        return 0  # not the job's exit status, which could equal WORKER_FAILED
    except BaseException:
        with open(folder / "supervisor.err", "a") as file:
            traceback.print_exc(file=file)
        return WORKER_FAILED


def start_detached(folder: Path) -> None:
    """Starts the keeper as a daemon, which outlives the SSH connection.

    sshd ends a session's processes by SIGHUP from the terminal or by closing their pipes. The
    keeper is in a session without a terminal (setsid; the second fork gives up the right to get
    one), and its standard streams are not the connection's.
    """
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    errors = os.open(folder / "supervisor.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, target in ((0, null), (1, null), (2, errors)):
        os.dup2(target, number)
    os.closerange(3, 256)  # among them the lock that the request holds
    # The worker inherits the lock, which lasts as long as either of the two processes.
    fcntl.flock(os.open(folder / KEEPER, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
    os.chdir("/")
    os._exit(keep(folder))

"""Keeps a job's supervisor running on a host.

A supervisor is two processes. The keeper only waits; the worker, its child, runs the job. If the
worker is killed, its children become the keeper's, which kills them and starts another worker. A
worker that neither ends nor shows that it runs, because a signal has stopped it or because it hangs
in a lock or in a call to a disk, is killed first.
"""

import contextlib
import faulthandler
import fcntl
import os
import select
import signal
import time
import traceback
from pathlib import Path

from launch.host import processes
from launch.host.claim import Claim
from launch.host.exit_codes import WORKER_FAILED
from launch.host.facts import with_timeout
from launch.host.files import read_json, write_json
from launch.host.ranks import MARGIN_S
from launch.host.restart_policy import Policy
from launch.host.supervise import Supervisor

KEEPER = "keeper"  # file that the keeper and its worker keep locked
KEEPER_ID = "keeper.json"  # which process it is; a worker that has lost it has another parent
WORKERS = 5  # workers that a keeper starts; a host that kills this many is unfit for the job
SLICE_S = 0.5
STACKS = signal.SIGUSR2  # makes a worker write its stacks to supervisor.err
STACKS_S = 0.5  # time to write them
WAS_KILLED, HAS_FAILED = "was killed", "failed; its error is in supervisor.err"


def keep(folder: Path) -> int:
    """Runs the keeper: starts workers until one brings the job to its end.

    Returns:
        0, or the exit status of the last worker.
    """
    processes.adopt_orphans()
    stopped_s = Policy(**read_json(folder / "job.json")["policy"]).stopped_s
    code, fate = WORKER_FAILED, ""
    for _ in range(WORKERS):
        life, shown = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.close(life)
            os._exit(_work(folder, fate, shown))
        os.close(shown)
        code, fate = _wait_for(worker, life, stopped_s)
        os.close(life)
        processes.kill_all(lambda: processes.descendants(os.getpid()))
        if code == 0:
            break
    return code


def _wait_for(worker: int, life: int, stopped_s: float) -> tuple[int, str]:
    """Returns the worker's exit status and what happened to it, in words.

    Kills it if nothing comes from `life` for stopped_s while a signal has stopped it, or for
    MARGIN_S more otherwise. Such a worker neither reports nor obeys, while its ranks go on. Killing
    it ends them, and the next worker reports what happened. As in launch.host.watch, only time in
    which this process itself runs counts.

    Args:
        life: a pipe that gets a byte whenever the worker shows that it runs.
    """
    silent_s, fate = 0.0, ""
    while True:
        if not select.select([life], [], [], SLICE_S)[0]:
            silent_s += SLICE_S
        elif os.read(life, 4096):
            silent_s = 0.0
        else:
            time.sleep(0.01)  # it is about to end
        exits = processes.reap()  # also of orphans of this worker or an earlier one
        if worker in exits:
            code = exits[worker]
            return code, fate or (HAS_FAILED if code == WORKER_FAILED else WAS_KILLED)
        stat = processes.read_stat(worker)
        is_stopped = stat is not None and stat.state in "Tt"
        if fate or silent_s <= stopped_s + (0.0 if is_stopped else MARGIN_S):
            continue
        fate = f"was stopped by a signal for over {silent_s:.0f} s, so it was killed"
        if not is_stopped:
            fate = f"hung for {silent_s:.0f} s, so it was killed; its stack is in supervisor.err"
            processes.send_signal(worker, STACKS)
            time.sleep(STACKS_S)
        processes.send_signal(worker, signal.SIGKILL)


def _work(folder: Path, fate: str, life: int) -> int:
    processes.die_with_parent(signal.SIGKILL)
    processes.adopt_orphans()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        faulthandler.register(STACKS, file=2)
        os.set_blocking(life, False)
        Supervisor(folder, fate, life).run()
        return 0  # not the job's exit status, which could equal WORKER_FAILED
    except BaseException:
        with open(folder / "supervisor.err", "a") as file:
            traceback.print_exc(file=file)
        return WORKER_FAILED


def start_detached(folder: Path, claim: Claim | None = None) -> None:
    """Starts the keeper as a daemon, which outlives the SSH connection.

    The daemon has the claim of the job's run directory from then on.

    sshd ends a session's processes by SIGHUP from the terminal or by closing their pipes. The
    keeper is in a session without a terminal (setsid; the second fork gives up the right to get
    one), and its standard streams are not the connection's.
    """
    if os.fork():
        os.wait()
        if claim:
            os.close(claim.file)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    errors = os.open(folder / "supervisor.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, target in ((0, null), (1, null), (2, errors)):
        os.dup2(target, number)
    claimed = claim.file if claim else 3
    os.closerange(3, claimed)  # among them the lock that the request holds
    os.closerange(claimed + bool(claim), 256)
    # The worker inherits the locks, which last as long as either of the two processes.
    fcntl.flock(os.open(folder / KEEPER, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
    write_json(folder / KEEPER_ID, processes.identify(os.getpid()))
    os.chdir("/")
    if claim:
        claim.sign()
    code = keep(folder)
    if claim:
        with contextlib.suppress(OSError):  # a file system that does not answer
            with_timeout(claim.release)
    os._exit(code)


def is_running(folder: Path) -> bool:
    """Returns whether the worker that wrote the status is alive."""
    return processes.is_identified(read_json(folder / "status.json"))


def has_supervisor(folder: Path) -> bool:
    """Returns whether the job has a supervisor; its worker may just be restarting."""
    missing = (FileNotFoundError, NotADirectoryError)  # the latter: a stray file among the jobs
    with contextlib.suppress(*missing), open(folder / KEEPER) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return is_running(folder)


def supervisor_pids(folder: Path) -> list[int]:
    """Returns the living ones of the job's keeper and its worker, in this order."""
    records = [read_json(folder / name) for name in (KEEPER_ID, "status.json")]
    return [record["pid"] for record in records if processes.is_identified(record)]

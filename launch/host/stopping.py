"""Stops a job on this host: asks its supervisor or, if that does not obey in time, kills it."""

import time
from collections.abc import Callable
from pathlib import Path

from launch.host import processes
from launch.host.exit_codes import STOPPED
from launch.host.files import read_json, write_json, write_text
from launch.host.keeper import has_supervisor, supervisor_pids
from launch.host.restart_policy import NOW
from launch.host.supervise import RESERVE

NOW_S = 5.0  # for the supervisor to end the ranks after `stop --now`
ENDING_S = 15.0  # for it to end then: it informs the other hosts and sends its alerts
KILL_S = 5.0  # a process that survives SIGKILL for this long hangs in the kernel


def stop(folder: Path, why: str, kill: bool) -> list[int]:
    """Stops the job of a folder on this host; returns its processes that cannot be killed.

    It asks the supervisor. It kills all of the job's processes itself with `kill`, if there is no
    supervisor, or if a stop is to happen NOW and the supervisor does not obey in time.

    Raises:
        OSError: nothing can be written here, which does not prevent a stop NOW; or all were killed,
            but without a stored outcome.
    """
    if has_supervisor(folder) and not kill and _ask_supervisor(folder, why):
        if why != NOW:
            return []
        if _happens_within(NOW_S, lambda: not processes.marked(folder.name)):
            _happens_within(ENDING_S, lambda: not has_supervisor(folder))
    # In one round, or an unkillable supervisor would protect the rest; it comes first, as it would
    # start the rest again.
    find = lambda: [*supervisor_pids(folder), *processes.marked(folder.name)]
    left = processes.kill_all(find, patience_s=KILL_S)
    if not read_json(folder / "status.json").get("outcome"):  # else a request could start the job
        _store_outcome(folder, why)
    return left


def _ask_supervisor(folder: Path, why: str) -> bool:
    """Leaves a request for the supervisor; returns whether that succeeded."""
    try:
        write_text(folder / "stop", why)
    except OSError:
        if why == NOW:
            return False
        (folder / "stop").touch()  # even a full disk has room for an empty file: a stop with a save
    return True


def _store_outcome(folder: Path, why: str) -> None:
    status = read_json(folder / "status.json") | {"outcome": {"code": STOPPED, "why": why}}
    try:
        (folder / RESERVE).unlink(missing_ok=True)  # it is there for this, if the disk is full
        write_json(folder / "status.json", status)
    except OSError as error:
        problem = f"the job's processes were killed, but its outcome was not stored ({error})"
        problem += ". Free disk space, and stop it again: `attach` would restart it"
        raise OSError(problem) from error


def _happens_within(limit_s: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True

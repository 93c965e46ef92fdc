"""Finds and ends all processes of a job, by their ancestry in /proc and a mark in the environment.

A child that calls setsid, or whose parent died, is still a descendant of the supervisor, because
the supervisor is its subreaper. A process that outlived its supervisor still carries JOB_MARK.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Environment variables that every process of a job, and of one attempt of it, inherits.
JOB_MARK, ATTEMPT_MARK = "JAXTRAIN_JOB", "JAXTRAIN_ATTEMPT"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Stat(NamedTuple):
    """Fields of /proc/PID/stat."""

    state: str  # R, S, D, T (stopped), Z (zombie), ...
    parent: int
    started: int  # clock ticks since boot; with the boot id, it identifies a reused pid


def read_stat(pid: int) -> Stat | None:
    """Returns a process's state, or None if it is gone. Source: proc(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may contain spaces and brackets
    return Stat(fields[0], int(fields[1]), int(fields[19]))


def identify(pid: int) -> dict[str, Any]:
    """Returns what tells a living process from every other one, also after a reboot."""
    stat = read_stat(pid)
    assert stat
    return {"pid": pid, "started": stat.started, "boot": boot_id()}


def is_identified(record: Mapping[str, Any]) -> bool:
    """Returns whether the process that `identify` described in a record is alive."""
    if record.get("boot") != boot_id():
        return False
    stat = read_stat(record["pid"])
    return stat is not None and stat.started == record["started"] and stat.state not in "ZX"


def boot_id() -> str:
    """Returns the id that the kernel generates at each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def descendants(root: int) -> list[int]:
    """Returns the living descendants of `root`. Zombies are left out: they hold no resources."""
    stats = {pid: stat for pid in pids() if (stat := read_stat(pid))}
    below, grown = {root}, True
    while grown:
        more = {pid for pid, stat in stats.items() if stat.parent in below} - below
        below, grown = below | more, bool(more)
    return sorted(pid for pid in below - {root} if stats[pid].state not in "ZX")


def marked(job_id: str) -> list[int]:
    """Returns this user's living processes whose environment names the job, except this process."""
    mark, matches = f"{JOB_MARK}={job_id}".encode(), []
    for pid in pids():
        with contextlib.suppress(OSError):  # gone, or another user's
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                matches.append(pid)
    return [pid for pid in matches if pid != os.getpid() and is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Returns whether a process exists and is not a zombie."""
    stat = read_stat(pid)
    return stat is not None and stat.state not in "ZX"


def kill_all(
    find: Callable[[], list[int]],
    on_exit: Callable[[dict[int, int]], None] = lambda exits: None,
    patience_s: float = 5.0,
) -> list[int]:
    """Sends SIGKILL to every process that `find` returns, until it returns none.

    It asks `find` again after each round, because a process may fork while it is being killed.

    Args:
        on_exit: called with {pid: exit status} of the children that have ended.

    Returns:
        The processes that are still alive after patience_s: they hang in the kernel.
    """
    deadline = time.monotonic() + patience_s
    while left := find():
        for pid in left:
            send_signal(pid, signal.SIGKILL)
        on_exit(reap())
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


def send_signal(pid: int, number: int) -> None:
    """Sends a signal to a process, which may be gone or, as by sudo, another user's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def reap() -> dict[int, int]:
    """Returns {pid: exit status} of the children that have ended, and frees their entries."""
    exits = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            exits[pid] = exit_status(status)
    return exits


def exit_status(wait_status: int) -> int:
    """Converts the status that wait() returns to that of shells: 128 + N after signal N."""
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Makes the kernel send this process a signal when its parent ends."""
    _prctl(PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")

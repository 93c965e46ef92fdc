"""Processes of a job, found by looking: in /proc, by ancestry and by the mark in their environment.

A child that calls setsid or whose parent died is still a descendant of the supervisor, which is
their subreaper; one that outlived its supervisor still carries JOB_MARK.
"""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

JOB_MARK = "JAXTRAIN_JOB"  # environment variable that every process of a job inherits
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Stat(NamedTuple):
    state: str  # R, S, D, T (stopped), Z, ...
    parent: int
    started: int  # clock ticks since boot: with the boot id, it tells a pid from its next owner


def read_stat(pid: int) -> Stat | None:
    """A process's /proc/PID/stat, or None where it is gone. Source: proc(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return Stat(fields[0], int(fields[1]), int(fields[19]))


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def descendants(root: int) -> list[int]:
    """Living processes below `root`; zombies hold nothing and do not count."""
    stats = {pid: stat for pid in pids() if (stat := read_stat(pid))}
    below, grown = {root}, True
    while grown:
        more = {pid for pid, stat in stats.items() if stat.parent in below} - below
        below, grown = below | more, bool(more)
    return sorted(pid for pid in below - {root} if stats[pid].state not in "ZX")


def marked(job: str) -> list[int]:
    """Living processes of this user whose environment names the job, this one excepted."""
    mark, found = f"{JOB_MARK}={job}".encode(), []
    for pid in pids():
        with contextlib.suppress(OSError):  # gone, or another user's
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return [pid for pid in found if pid != os.getpid() and alive(pid)]


def alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.state not in "ZX"


def end_all(find, note=lambda ended: None, patience_s: float = 5.0) -> list[int]:
    """SIGKILLs what `find` gives until it gives nothing; returns what is left (stuck in a driver).

    It looks again after each round: a process may fork while it is being killed.

    Args:
        note: takes {pid: exit status} of the children that end meanwhile.
    """
    deadline = time.monotonic() + patience_s
    while left := find():
        for pid in left:
            send(pid, signal.SIGKILL)
        note(reap())
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def reap() -> dict[int, int]:
    """{pid: exit status as shells have it} of children that have ended."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(found[1])
            ended[found[0]] = 128 - code if code < 0 else code
    return ended


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose own parent ends."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """This process gets the signal when its parent ends."""
    _prctl(PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")

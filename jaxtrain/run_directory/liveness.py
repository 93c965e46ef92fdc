"""Reads which process owns a run's lock file, and finds out whether that process is alive.

The lock file is JSON, written by `describe_this_process`.
"""

import contextlib
import fcntl
import json
import os
import random
import shlex
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

JOB_VARIABLE = "JAXTRAIN_JOB"  # the job of this process; set by launch/host/ranks.py
TRIES = 20  # of find_owner, whose other callers have the lock only for a moment
PAUSES = random.SystemRandom()  # a run may have seeded Python's own generator equally on all hosts
# Types of file systems whose flock, by default, works only between the processes of one host.
THIS_HOST_ONLY = ("9p", "fuse", "virtiofs", "vboxsf", "drvfs")
# Mount options that limit flock to one host.
LOCAL_OPTIONS = {"nolock", "localflock", "nobrl", "local_lock=all", "local_lock=flock"}


def describe_this_process(run_id: str | None, inode: int) -> dict[str, Any]:
    """Returns the content of the lock file of this process.

    Args:
        run_id: id that the run's processes share, if it has several.
        inode: inode of the lock file. It differs in a copy of the folder, which has no owner.
    """
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "start": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "command": shlex.join(sys.argv),
        "job": os.environ.get(JOB_VARIABLE, ""),
        "run": run_id,
        "boot": boot_id(),
        "pid_start": pid_start(os.getpid()),
        "inode": inode,
    }


def read_owner(path: str | Path) -> dict[str, Any]:
    """Returns the content of a lock file; {} if it is missing, empty or damaged."""
    try:
        owner = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and {"pid", "host", "start"} <= owner.keys() else {}


def find_owner(path: str | Path) -> dict[str, Any]:
    """Returns the content of a lock file whose owner is alive; {} if nobody has the lock.

    It locks the file for a moment, and so do other callers. An owner keeps the lock, so this tries
    again for at most 0.4 s before it reports one. An owner on another host is missed if the file
    system does not lock between hosts. Starting a run there notices it.
    """
    for _ in range(TRIES):
        try:
            # NFS gives an exclusive lock only to who may write.
            file = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
        except OSError:
            return {}
        try:
            # Exclusive, because several processes of a run, or hosts of a job, may share the lock.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(PAUSES.uniform(0.005, 0.02))
            continue
        except OSError:  # this file system has no flock
            pass
        finally:
            os.close(file)
        return read_owner(path) if is_owner_alive(path, None, stale_s=0.0) else {}
    return read_owner(path)


def is_owner_alive(path: str | Path, run_id: str | None, stale_s: float) -> bool:
    """Returns whether the lock file names another run that is alive, without using flock.

    An owner on the same boot of the same host is alive if its pid is. For an owner elsewhere, this
    waits at most stale_s for the owner to touch the file. It compares the file's time with its
    earlier time and not with a clock, because the clocks of hosts differ by any amount.
    """
    with contextlib.suppress(FileNotFoundError):  # an owner that ends removes the file
        owner, before = read_owner(path), os.stat(path)
        if not owner:
            return False
        if owner.get("inode") != before.st_ino or (run_id and owner.get("run") == run_id):
            return False
        if owner.get("boot") == boot_id() != "":
            return owner["pid"] != os.getpid() and pid_start(owner["pid"]) == owner.get("pid_start")
        deadline = time.monotonic() + stale_s
        while time.monotonic() < deadline:
            time.sleep(stale_s / 60)
            if os.stat(path).st_mtime_ns != before.st_mtime_ns:
                return True
    return False


def is_same_file(descriptor: int, path: Path) -> bool:
    """Returns whether an open file is the one that the path names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def boot_id() -> str:
    """Returns an id of this boot of the kernel and its pid namespace; "" without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def pid_start(pid: int) -> str:
    """Returns when a process started, in clock ticks since boot; "" if it is not running.

    It distinguishes a process from a later one with the same pid.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, start = fields[0], fields[19]
    return "" if state in "ZX" else start


def locks_this_host_only(folder: str | Path, mounts: str | Path = "/proc/self/mountinfo") -> str:
    """Returns the folder's file-system type if its flock does not lock for other hosts, else ""."""
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return ""
    resolved = Path(folder).resolve()
    longest, kind, options = "", "", ""  # of the innermost mount that contains the folder
    for line in lines:
        before, _, after = line.partition(" - ")
        escaped, own_options = before.split()[4:6]
        # Spaces and other bytes are written as octal escapes.
        point = escaped.encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")
        if resolved.is_relative_to(point) and len(point) >= len(longest):
            kind, *_, super_options = after.split()
            longest, options = point, f"{own_options},{super_options}"
    is_local = kind.startswith(THIS_HOST_ONLY) or LOCAL_OPTIONS & set(options.split(","))
    return kind if is_local else ""

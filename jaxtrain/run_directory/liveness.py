"""Who has a run's lock file, and whether that process is alive, as far as this host can tell."""

import json
import os
import shlex
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

OLD_S = 3_600.0  # a lock file untouched for so long is nobody's, whatever hosts' clocks differ by
# File systems whose flock holds between the processes of one host only, as they are by default.
THIS_HOST_ONLY = ("9p", "fuse", "virtiofs", "vboxsf", "drvfs")


def this_process(run: str | None, inode: int) -> dict:
    """Returns what a lock file says of its owner.

    Args:
        run: id of the run, shared by its processes.
        inode: of the lock file; a copied folder's owner is not the owner of the copy.
    """
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "start": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "command": shlex.join(sys.argv),
        "run": run,
        "boot": boot_id(),
        "pid_start": pid_start(os.getpid()),
        "inode": inode,
    }


def read_owner(path) -> dict:
    """Returns what a lock file says of its owner; {} if it is missing, empty or damaged."""
    try:
        owner = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and {"pid", "host", "start"} <= owner.keys() else {}


def is_alive(path, run: str | None, stale_s: float) -> bool:
    """Whether another run's owner of a lock file is alive, where the kernel cannot tell.

    On the same boot of the same host its pid decides. Elsewhere this waits for the owner to touch
    the file, at most stale_s, for clocks of hosts differ.
    """
    owner, found = read_owner(path), os.stat(path)
    if not owner:
        return False
    if owner.get("inode") != found.st_ino or (run and owner.get("run") == run):
        return False
    if owner.get("boot") == boot_id() != "":
        return owner["pid"] != os.getpid() and pid_start(owner["pid"]) == owner.get("pid_start")
    if time.time() - found.st_mtime > OLD_S:
        return False
    deadline = time.monotonic() + stale_s
    while time.monotonic() < deadline:
        time.sleep(stale_s / 60)
        if os.stat(path).st_mtime_ns != found.st_mtime_ns:
            return True
    return False


def boot_id() -> str:
    """Names this boot of this kernel and its set of process ids; empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def pid_start(pid: int) -> str:
    """Returns when a process started, in clock ticks since boot; empty if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def locks_this_host_only(folder, mounts="/proc/self/mountinfo") -> str:
    """Returns the type of the folder's file system if its flock does not reach other hosts."""
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return ""
    folder, best = Path(folder).resolve(), ("", "", "")
    for line in lines:
        before, _, after = line.partition(" - ")
        point, own = before.split()[4:6]
        point = point.encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")
        kind, *_, options = after.split()
        if folder.is_relative_to(point) and len(point) >= len(best[0]):
            best = point, kind, f"{own},{options}"
    _, kind, options = best
    weak = {"nolock", "localflock", "nobrl", "local_lock=all", "local_lock=flock"}
    return kind if kind.startswith(THIS_HOST_ONLY) or weak & set(options.split(",")) else ""

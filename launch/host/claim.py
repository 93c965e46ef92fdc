"""Claims a job's run directory on a host, from the job's start to its end.

The trainer's lock, jaxtrain/run_directory/lock.py, lasts only while a rank runs. Between two
attempts, as while a job waits for a host, another job could take the directory. So a job's
supervisors keep `.job` there locked on every host. Its content has the form of the trainer's lock
file, because the trainer reads it, too: for preflight, and before it locks the directory itself.

The lock is flock(2). It lasts as long as the supervisor's keeper or worker lives, and ends with
them even by kill -9. Hosts that share the directory share the lock by the job's id. If flock does
not work, or locks for one host only, a host cannot tell whether a job on another host still runs.
Then a file that names a job of another host is left alone: this job runs without a claim, and its
log says so.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.host import processes
from launch.host.facts import with_timeout
from launch.host.file_system import locks_this_host_only
from launch.host.run_files import WORKDIR, run_directory

JOB_FILE = ".job"
WAIT_S = 2.0  # for an owner that is ending, or about to share the lock with its job's other hosts
GAP = "between attempts, jobs on other hosts can write there, too"
NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


class Claim:
    """A job's right to write to a run directory; the folder is created if it is missing.

    Attributes:
        file: descriptor of the locked file. A forked child shares the lock.
        gap: what the claim does not protect against; "" if it protects fully.

    Raises:
        RuntimeError: another job has claimed the directory and is alive.
        OSError: the file cannot be created or written, or names a job that may be running.
    """

    def __init__(
        self,
        folder: Path,
        job: str,
        flock: Callable[[int, int], Any] = fcntl.flock,
        wait_s: float = WAIT_S,
    ):
        self.path, self._job, self._flock = folder / JOB_FILE, job, flock
        self._is_author = False  # of the file's content
        self._has_flock = True
        self._in_doubt = False  # whether the job that the file names is running
        self._created_folder = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        kind = locks_this_host_only(folder)
        self.gap = f"{kind} does not lock {self.path} for other hosts: {GAP}" if kind else ""
        deadline = time.monotonic() + wait_s
        while not self._try_to_acquire():
            if time.monotonic() > deadline:
                raise self._refusal()
            time.sleep(0.05)

    def _try_to_acquire(self) -> bool:
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        acquired = False
        try:
            # The last owner may have removed the file after it was opened here.
            acquired = self._lock() and self._is_own()
        finally:
            if not acquired:
                os.close(self.file)
        return acquired

    def _lock(self) -> bool:
        try:
            self._flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._share()
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            self._has_flock = False
            self.gap = f"{self.path} cannot be locked ({error.strerror}): {GAP}"
        if self.gap and (owner := read_owner(self.path)) and owner["job"] != self._job:
            alive = _is_alive(owner)
            self._in_doubt = alive is None
            if alive is not False:
                return False
        try:
            self._write()
        except OSError:
            if self._is_at_path():
                self.path.unlink()  # a lock that names nobody would keep out this job's other hosts
            raise
        if self._has_flock:
            # Admits this job's other hosts. Another job may get in between the two locks; then the
            # file no longer names this one.
            self._flock(self.file, fcntl.LOCK_SH)
        return True

    def _share(self) -> bool:
        """Shares the lock if this job has it.

        That is on another host, or in a worker whose keeper was killed and that is about to end.
        """
        owner, self._in_doubt = read_owner(self.path), False
        if owner.get("job") != self._job:
            return False
        try:
            self._flock(self.file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # the first host is about to share it
            return False
        self._is_author = owner["host"] == socket.gethostname()
        return True

    def sign(self) -> None:
        """Names this process in the file, if its content is of this host."""
        with contextlib.suppress(OSError):  # the file names the job all the same
            if self._is_author and self._is_own():
                self._write()

    def release(self) -> None:
        """Removes the file, unless another host of this job still has it locked."""
        with contextlib.suppress(OSError):
            if self._has_flock:
                self._flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_own():
                self.path.unlink()
            if self._created_folder:
                self.path.parent.rmdir()  # fails if the job has written anything
        os.close(self.file)

    def _write(self) -> None:
        me = processes.identify(os.getpid())
        owner = {
            "pid": me["pid"],
            "host": socket.gethostname(),
            "start": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "job": self._job,
            "run": self._job,
            "boot": _boot(),
            "pid_start": str(me["started"]),
            "inode": os.fstat(self.file).st_ino,
        }
        data = f"{json.dumps(owner)}\n".encode()
        if os.pwrite(self.file, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.ftruncate(self.file, len(data))
        self._is_author = True

    def _is_own(self) -> bool:
        """Returns whether the file at the path is the locked one, and names this job."""
        return self._is_at_path() and read_owner(self.path).get("job") == self._job

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self) -> OSError | RuntimeError:
        folder, owner = self.path.parent, read_owner(self.path)
        if not owner:
            problem = f"a process that {self.path} does not name has locked it"
            find = f"`fuser -v {self.path}` on its host shows the pid"
            return RuntimeError(f"{problem}. {find}: end it, or set another {WORKDIR}")
        who = f"job {owner['job']} (pid {owner['pid']} on {owner['host']})"
        if self._in_doubt:
            problem = f"{self.path} names {who}, which may be running"
            return OSError(f"{problem} (remove the file if it is not)")
        return RuntimeError(
            f"{who} is running and writes to {folder}. Stop it with `python -m launch.run stop "
            f"{owner['job']}`, or set another {WORKDIR}. If nothing of it runs there, another of "
            f"its hosts may have the lock; if that host is down, remove {self.path} and start again"
        )


def claim_run_directory(spec: dict[str, Any]) -> Claim | None:
    """Claims the run directory of a job's specification, to which it adds what must be logged.

    Returns:
        None if no directory is known, or the file cannot be written: the trainer then says why.

    Raises:
        RuntimeError: another job has claimed the directory, or its file system does not answer.
    """
    workdir = run_directory(spec)
    if not workdir:
        return None
    try:
        claim = with_timeout(Claim, workdir, spec["id"])
    except TimeoutError as error:
        raise RuntimeError(f"{workdir}: {error}. Look at its file system on this host") from None
    except OSError as error:
        spec["unclaimed"] = f"{error}: between attempts, other jobs can write there, too"
        return None
    spec["unclaimed"] = claim.gap
    return claim


def read_owner(path: Path) -> dict[str, Any]:
    """Returns the content of a file that names an owner; {} if it is missing or damaged."""
    try:
        owner = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    keys = {"pid", "host", "job", "boot", "pid_start"}
    return owner if isinstance(owner, dict) and keys <= owner.keys() else {}


def _boot() -> str:
    """Returns an id of this boot and pid namespace, in the form of the trainer's lock file."""
    return f"{processes.boot_id()} {os.readlink('/proc/self/ns/pid')}"


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Returns whether an owner is alive; None if that cannot be found out on this host."""
    boot = _boot()
    if owner["boot"] == boot:
        stat = processes.read_stat(owner["pid"])
        return (
            stat is not None and str(stat.started) == owner["pid_start"] and stat.state not in "ZX"
        )
    # Containers of a host can have the same boot and name, but other pids.
    was_rebooted = owner["boot"].split()[:1] != boot.split()[:1]
    return False if was_rebooted and owner["host"] == socket.gethostname() else None

"""Locks a run directory until the process ends, so that only one run writes to it.

Two runs in one directory would remove each other's unfinished checkpoints and overwrite each
other's metrics.jsonl. So a run locks `.lock` in the directory before it touches anything else. The
error that refuses a second run names the pid, host and start time of the first.

The lock is flock(2). The kernel releases it when its last owner ends, even by kill -9; the file
then still names that owner, until the next run overwrites it. A POSIX lock (lockf) would be lost
as soon as this process opened and closed the file anywhere. On NFSv4, CephFS, GPFS and Lustre
mounted with `flock`, the lock works between hosts, too. Child processes do not inherit it.

Some file systems support flock not at all, or only between the processes of one host (NFS mounted
with `nolock`, most FUSE file systems). There the owner named in the file is checked as well: on the
same boot of the same host it is alive if its pid is; elsewhere, if one of its threads touches the
file. The run prints that it relies on this. It does not protect against two simultaneous starts on
two hosts, nor against a start while the owner is suspended.

NFSv3 keeps the lock of a host that has died until that host is up again. Removing `.lock` frees the
directory, because a new file has a new lock. A run whose `.lock` was removed notices before its
next save; it then takes the lock again, or stops if another run has it.

A job of the launcher also keeps `.job` in the directory locked, from its start to its end, because
it may wait for a long time between two attempts (launch/host/claim.py). A run that does not belong
to this job is refused meanwhile.

With checkpoint.storage=host0 every host has its own directory, where each of its processes
writes hosts/N.jsonl. These processes share the lock by the id of their run, so that another run is
refused on each of these hosts.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from jaxtrain.file_errors import add_path_to_errors, describe_error
from jaxtrain.run_directory.liveness import (
    JOB_VARIABLE,
    describe_this_process,
    find_owner,
    is_owner_alive,
    is_same_file,
    locks_this_host_only,
    read_owner,
)

LOCK_FILE, JOB_FILE = ".lock", ".job"
WAIT_S = 2.0  # for an owner that is exiting: after a kill, freeing GPU memory takes up to a second
BEAT_S, BEATS = 10.0, 6  # the file is touched every BEAT_S; an owner that misses BEATS is dead
NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


class RunLocked(ValueError):
    """Another process that is alive writes to the run directory."""


class RunLock:
    """The right to write to a run directory; a context manager.

    Args:
        workdir: the run directory, created if missing.
        flag: the flag that sets the directory, for error messages.
        run_id: an id by which all processes of a run share the lock; None for a single process.
        flock: the system call that locks.
        beat_s: time between two touches of the file, if flock does not lock for other hosts.
        wait_s: how long to wait for an owner to end before this run is refused.
        name: the lock file's name.

    Raises:
        RunLocked: on entry, another run has the lock; in check(), another run has taken it.
        ValueError: on entry, the directory cannot be created or written to.
    """

    def __init__(
        self,
        workdir: str | Path,
        flag: str = "--workdir",
        run_id: str | None = None,
        flock: Callable[[int, int], Any] = fcntl.flock,
        beat_s: float = BEAT_S,
        wait_s: float = WAIT_S,
        name: str = LOCK_FILE,
    ):
        self.workdir, self.path = Path(workdir), Path(workdir) / name
        self._flag, self._run_id, self._flock = flag, run_id, flock
        self._beat_s, self._wait_s = beat_s, wait_s
        self._file: int | None = None  # descriptor of the locked file
        self._created_folder = False
        self._gap = ""  # what the lock does not protect against
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        try:
            self._created_folder = not self.workdir.exists()
            self.workdir.mkdir(parents=True, exist_ok=True)
            if self.path.name == LOCK_FILE:
                self._refuse_other_job()
            self._acquire()
        except OSError as error:
            self._release()
            self._remove_created_folder()
            raise ValueError(
                f"a run needs a folder that it can write to; got {describe_error(error)}. "
                f"Set {self._flag}."
            ) from error
        if self._gap:
            threading.Thread(target=self._touch_regularly, name="run_lock", daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._ended.set()
        if self._file is None:  # check() has found that another run has the lock
            return
        with contextlib.suppress(OSError):  # an error of a lost disk must not hide why the run ends
            if self._run_id and not self._gap:
                # Fails, and keeps the file, unless this is the last process of the run.
                self._flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._owns_path():
                self.path.unlink()
        self._release()
        self._remove_created_folder()

    def check(self) -> None:
        """Takes the lock again if its file was removed. Call this before overwriting anything.

        It costs two accesses to the file system.

        Raises:
            RunLocked: another run has locked a new file.
            ValueError: the file cannot be created again, for instance because a folder is there.
        """
        if self._owns_path():
            return
        self._release()
        try:
            self._acquire()
        except OSError as error:
            raise ValueError(
                f"the lock of a run must be a file that it can write to; got "
                f"{describe_error(error)}. Remove {self.path} and start again, or set {self._flag}."
            ) from error

    def describe(self) -> list[str]:
        """Returns a line on what the lock does not protect against; [] if it protects fully."""
        return [self._gap] if self._gap else []

    def _refuse_other_job(self) -> None:
        path, own_job = self.workdir / JOB_FILE, os.environ.get(JOB_VARIABLE)
        if read_owner(path).get("job") == own_job:  # find_owner would try for 0.4 s to lock it
            return
        owner = find_owner(path)
        if owner and owner.get("job") != own_job:
            raise RunLocked(self._describe_refusal(path, owner))

    def _acquire(self) -> None:
        deadline = time.monotonic() + self._wait_s
        while not self._try_to_acquire():
            owner = read_owner(self.path)
            if time.monotonic() > deadline:
                raise RunLocked(self._describe_refusal(self.path, owner))
            time.sleep(0.05)

    def _try_to_acquire(self) -> bool:
        """Locks the file and writes its owner; returns False if another run has the lock."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        _LOCKED.add(self._file)
        # The previous owner may have removed the file after it was opened here. Then this locks a
        # file without a name, which excludes no other run.
        if self._lock(self._file) and is_same_file(self._file, self.path):
            return True
        self._release()
        return False

    def _lock(self, file: int) -> bool:
        self._gap = ""
        try:
            self._flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._share(file)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            self._gap = f"{self.path} cannot be locked ({error.strerror})"
        kind = locks_this_host_only(self.workdir)
        if kind and not self._gap:
            self._gap = f"{kind} does not lock {self.path} for other hosts"
        if self._gap:
            self._gap += (
                "; a second run is only noticed if its pid is alive on this host, or if it touches "
                "the file"
            )
            if is_owner_alive(self.path, self._run_id, BEATS * self._beat_s):
                return False
        self._write_owner(file)
        if self._run_id and not self._gap:
            # Admits the other processes of this run. Downgrading a lock is not atomic: the kernel
            # drops the old one first, and another run may get in between.
            self._flock(file, fcntl.LOCK_SH)
            return self._names_this_run()
        return True

    def _share(self, file: int) -> bool:
        """Shares the lock if another process of this run has it."""
        if not self._run_id or not self._names_this_run():
            return False
        try:
            self._flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # the first process is about to share it
            return False
        return self._names_this_run()

    def _write_owner(self, file: int) -> None:
        owner = describe_this_process(self._run_id, os.fstat(file).st_ino)
        text = (json.dumps(owner, indent=1) + "\n").encode()
        with add_path_to_errors(self.path):
            try:
                os.ftruncate(file, 0)
                if os.pwrite(file, text, 0) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                if is_same_file(file, self.path):
                    self.path.unlink()
                raise

    def _touch_regularly(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _names_this_run(self) -> bool:
        return read_owner(self.path).get("run") == self._run_id

    def _owns_path(self) -> bool:
        """Returns whether the file at the path is the locked one, and names this run as its owner.

        Without flock, another run may have overwritten the owner.
        """
        if self._file is None or not is_same_file(self._file, self.path):
            return False
        owner = read_owner(self.path)
        return owner.get("run") == self._run_id and (
            self._run_id is not None or owner.get("pid") == os.getpid()
        )

    def _release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            _LOCKED.discard(file)
            os.close(file)

    def _remove_created_folder(self) -> None:
        """Removes the folder if it is empty, so that a refused start leaves nothing behind."""
        if self._created_folder:
            with contextlib.suppress(OSError):
                self.workdir.rmdir()

    def _describe_refusal(self, path: Path, owner: dict[str, Any]) -> str:
        rule = f"only one run may write to a folder; {self.workdir} is in use by"
        if not owner:
            unnamed = f"a process that {path.name} does not name"
            find = f"`fuser -v {path}` on its host shows the pid"
            return f"{rule} {unnamed}. {find}: end it, or set {self._flag}."
        is_here = owner["host"] == socket.gethostname()
        where = "" if is_here else f" on {owner['host']}"
        job, stop = "", f"`kill {owner['pid']}`{where}"
        if owner.get("job"):  # its supervisor would start a killed process again
            job, stop = f"job {owner['job']}, ", f"`python -m launch.run stop {owner['job']}`"
        text = (
            f"{rule} {job}pid {owner['pid']} on {owner['host']}, started {owner['start']}. "
            f"Wait until it ends, stop it with {stop} (it saves first), or "
            f"set another {self._flag}."
        )
        if path.name == JOB_FILE:
            return (
                f"{text} If nothing of it runs there, another of its hosts may have the lock; if "
                f"that host is down, remove {path} and start again."
            )
        if is_here:
            return text
        return f"{text} If that host has died, remove {path} and start again."


_LOCKED: set[int] = set()  # descriptors that this process has locked


def _close_in_child() -> None:
    for file in _LOCKED:
        os.close(file)
    _LOCKED.clear()


# A forked child shares the open file, and would keep it locked after the owner has ended.
os.register_at_fork(after_in_child=_close_in_child)

"""One writer per run directory: a lock that ends with its process, however the process ends.

Two starts in one directory would remove each other's unfinished checkpoints and replace the
metrics.jsonl that the other one has open. So a start locks `.lock` in the directory before it
touches anything else, and a second start is refused with the owner's pid, host and start time.

The lock is flock(2). The kernel drops it when its last holder ends, also after kill -9; what the
file then says is out of date and is replaced. POSIX locks (lockf) would be lost as soon as anything
in this process opened and closed the file. On NFSv4, CephFS, GPFS and Lustre mounted with `flock`
it also holds between hosts. Programs that are executed and forks do not inherit it.

Where flock is not supported, or reaches the processes of one host only (NFS mounted with `nolock`,
most FUSE file systems), what the file says decides as well: its owner is alive if its pid is, on
the same boot of the same host; from elsewhere, if a thread of the owner touches the file. The start
prints that. What is then not prevented: two starts at the same moment on two hosts, and a start
beside an owner that is suspended.

NFSv3 keeps the lock of a host that has died until it is up again. Removing `.lock` frees it: a new
file is a new lock. A run whose `.lock` was removed notices before its next save; it then takes the
lock again, or stops if another run has it.

With checkpoint.storage=host0 each host has a directory of its own, where its processes write
hosts/N.jsonl. All of them then share the lock, by the id of their run: another run is refused on
whichever host the two meet.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from jaxtrain.file_errors import add_path_to_errors, describe_error
from jaxtrain.run_directory.liveness import is_alive, locks_this_host_only, read_owner, this_process

LOCK_FILE = ".lock"
WAIT_S = 2.0  # for an owner that is ending: a killed process may free GPU memory for a second
BEAT_S, BEATS = 10.0, 6  # a touch of the file every BEAT_S; an owner that misses BEATS is dead
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


class RunLocked(ValueError):
    """Another process that is alive writes to the run directory."""


class RunLock:
    """The right to write to a run directory. Use it as a context manager.

    Args:
        workdir: made if missing.
        flag: names the directory on this command's line, for errors.
        run: id that the processes of one run share to hold the lock together; None: one process.
        flock: takes the kernel's lock.
        beat_s: between signs of life, where the kernel's lock does not reach.
        wait_s: for an owner to end, before this one is refused.

    Raises:
        RunLocked: on entry, another run has the lock; in check(), another run has taken it.
        ValueError: on entry, the directory cannot be made or written to.
    """

    def __init__(
        self,
        workdir,
        flag="--workdir",
        run=None,
        flock=fcntl.flock,
        beat_s=BEAT_S,
        wait_s=WAIT_S,
    ):
        self.workdir, self.path = Path(workdir), Path(workdir) / LOCK_FILE
        self._flag, self._run, self._flock = flag, run, flock
        self._beat_s, self._wait_s = beat_s, wait_s
        self._file, self._made = None, False
        self._gap = ""  # what the lock does not protect from
        self._ended = threading.Event()

    def __enter__(self):
        try:
            self._made = not self.workdir.exists()
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            self._release()
            self._remove_folder()
            raise ValueError(
                f"a run needs a folder that it can write to; got {describe_error(error)}. "
                f"Set {self._flag}."
            ) from error
        if self._gap:
            threading.Thread(target=self._beat, name="run_lock", daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._ended.set()
        if self._file is None:  # check() has lost it
            return
        with contextlib.suppress(OSError):  # a disk that is gone must not hide why the run ends
            if self._run and not self._gap:
                self._flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the last one removes it
            if self._is_at_path() and self._is_ours():
                self.path.unlink()
        self._release()
        self._remove_folder()

    def check(self) -> None:
        """Raises RunLocked if the lock's file was removed and another run has locked a new one.

        A lock that cannot be taken again, such as a folder in its place, is a ValueError.

        To be called before anything is overwritten: it costs two looks at the file system.
        """
        if not (self._is_at_path() and self._is_ours()):
            self._release()
            try:
                self._take()
            except OSError as error:
                raise ValueError(
                    f"the lock of a run must be a file that it can write to; got "
                    f"{describe_error(error)}. Remove {self.path} and start again, or "
                    f"set {self._flag}."
                ) from error

    def describe(self) -> list[str]:
        """Returns a line on what the lock does not protect from; none if it protects."""
        return [self._gap] if self._gap else []

    def _take(self) -> None:
        deadline = time.monotonic() + self._wait_s
        while not self._try():
            owner = read_owner(self.path)
            if time.monotonic() > deadline:
                raise RunLocked(self._refusal(owner))
            time.sleep(0.05)

    def _try(self) -> bool:
        """Locks the file at the path and writes who has it; False if another run has it."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(self._file)
        if self._lock() and self._is_at_path():  # else its last owner has removed it
            return True
        self._release()
        return False

    def _lock(self) -> bool:
        self._gap = ""
        try:
            self._flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._join()
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._gap = f"{self.path} cannot be locked ({error.strerror})"
        kind = locks_this_host_only(self.workdir)
        if kind and not self._gap:
            self._gap = f"{kind} does not lock {self.path} for other hosts"
        if self._gap:
            self._gap += "; a second start is recognised by pid here, by signs of life elsewhere"
            if is_alive(self.path, self._run, BEATS * self._beat_s):
                return False
        self._write()
        if self._run and not self._gap:
            self._flock(self._file, fcntl.LOCK_SH)  # not atomic: another run may be in between
            return read_owner(self.path).get("run") == self._run
        return True

    def _join(self) -> bool:
        """Shares the lock with this run's other processes."""
        if not self._run or read_owner(self.path).get("run") != self._run:
            return False
        try:
            self._flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # the first of them is about to share it
            return False
        return read_owner(self.path).get("run") == self._run

    def _write(self) -> None:
        owner = this_process(self._run, os.fstat(self._file).st_ino)
        text = (json.dumps(owner, indent=1) + "\n").encode()
        with add_path_to_errors(self.path):
            try:
                os.ftruncate(self._file, 0)
                if os.pwrite(self._file, text, 0) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self.path.unlink()
                raise

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _is_ours(self) -> bool:
        """Whether the file names this run; where nothing is locked, another may have taken it."""
        owner = read_owner(self.path)
        mine = owner.get("run") == self._run
        return mine and (self._run is not None or owner.get("pid") == os.getpid())

    def _release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            _held.discard(file)
            os.close(file)

    def _remove_folder(self) -> None:
        if self._made:
            with contextlib.suppress(OSError):
                self.workdir.rmdir()  # a start that was refused leaves no empty folder

    def _refusal(self, owner: dict) -> str:
        rule = f"only one run may write to a folder; {self.workdir} is in use by"
        if not owner:
            return f"{rule} a process that {LOCK_FILE} does not name. End it, or set {self._flag}."
        here = owner["host"] == socket.gethostname()
        kill = f"kill {owner['pid']}" + ("" if here else f" on {owner['host']}")
        text = (
            f"{rule} pid {owner['pid']} on {owner['host']}, started {owner['start']}. Wait for its "
            f"end, stop it ({kill}: it saves first), or set another {self._flag}."
        )
        died = f" If that host has died, remove {self.path} and start again."
        return text if here else text + died


_held: set[int] = set()


def _close_in_child() -> None:
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)  # else a fork would outlive the lock's owner

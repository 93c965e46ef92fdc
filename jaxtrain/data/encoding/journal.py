"""One encoding at a time in a folder, and its progress, so that a stopped one can go on."""

import contextlib
import errno
import json
import os
import shutil
import socket
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from jaxtrain.data.encoding.formats import shown
from jaxtrain.files import write_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = 1  # of the journal, and of the order in which the input is read
LOCK, STATE, PROGRESS = ".encoding.lock", ".encoding-", "progress.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
POLL_S = 0.2


@contextlib.contextmanager
def lock_folder(folder: Path, wait: bool = False):
    """Makes the folder and keeps other encodings out of it; the lock ends with the process.

    Yields:
        whether the folder is locked: some network file systems have no locks.

    Raises:
        ValueError: another process is encoding into the folder, and `wait` is off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    number, locked = _open_locked(path)
    while number is None:  # another's
        if not wait:
            raise ValueError(
                f"{shown(folder)} must be written by one encoding at a time; {_owner(path)} is "
                "writing it. Wait until it ends, or choose another folder."
            )
        time.sleep(POLL_S)
        number, locked = _open_locked(path)
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {now},"
        os.truncate(number, 0)
        os.pwrite(number, owner.encode(), 0)
        yield locked
    finally:
        path.unlink(missing_ok=True)  # before the lock ends: then it can only be our own
        os.close(number)


def _owner(path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")[:200] or "another process"
    return "another process"


def _open_locked(path):
    """(descriptor, whether there are locks); (None, True) where another process holds it."""
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = _lock(number)
        # A file that its owner has removed since it was opened keeps nobody out.
        if locked is not None and _is_same(number, path):
            number, result = None, (number, locked)
            return result
        return None, True
    finally:
        if number is not None:
            os.close(number)


def _lock(number) -> bool | None:
    """True once locked, None where another holds the lock, False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_same(number, path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False


class Journal:
    """The folder of an encoding's unfinished shards, with how far it has come."""

    def __init__(self, out: Path, key: str, piece_bytes: int, locked: bool):
        """Opens the journal of an encoding that was stopped, or begins one.

        Args:
            key: stands for the input and the options; another key's journal is removed.
            locked: no other process uses `out`; else nothing can be resumed.
        """
        name = key[:16] if locked else f"{key[:16]}-{uuid.uuid4().hex[:8]}"
        self.folder = out / f"{STATE}{name}"
        self._piece_bytes, self._keep = piece_bytes, locked
        self.replaced = False  # another input or other options were stopped here
        for other in out.glob(f"{STATE}*") if locked else ():
            if other.is_dir() and other != self.folder:
                self.replaced |= (other / PROGRESS).exists()
                shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self.progress: dict = self._read()  # empty, or what `write` was last given

    def _read(self) -> dict:
        try:
            found = json.loads((self.folder / PROGRESS).read_text())
            same = (found["version"], found["piece_bytes"]) == (VERSION, self._piece_bytes)
            return found["progress"] if same and isinstance(found["progress"], dict) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def write(self, progress: dict) -> None:
        """Replaces the progress, on disk when it returns; what it describes must be there."""
        found = {"version": VERSION, "piece_bytes": self._piece_bytes, "progress": progress}
        write_atomic(self.folder / PROGRESS, json.dumps(found))
        self.progress = progress

    def close(self, resumable: bool) -> None:
        """Keeps what is needed to go on, or removes the folder."""
        if not (resumable and self._keep and self.progress):
            shutil.rmtree(self.folder, ignore_errors=True)

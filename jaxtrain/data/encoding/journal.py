"""Stores the progress of an encoding, so that it can be resumed, and locks its folder."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from jaxtrain.data.encoding.formats import printable_path
from jaxtrain.files import write_atomic
from jaxtrain.run_directory.liveness import is_same_file
from jaxtrain.run_directory.lock import NO_FLOCK

VERSION = 1  # of the journal, and of the order in which the input is read
LOCK, STATE, PROGRESS = ".encoding.lock", ".encoding-", "progress.json"
POLL_S = 0.2


@contextlib.contextmanager
def lock_folder(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Creates the folder and locks it against other encodings; a kill releases the lock.

    Yields:
        whether the folder is locked; False on a network file system without locks.

    Raises:
        ValueError: another process is encoding into the folder, and `wait` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while (lock := _try_lock(path)) is None:
        if not wait:
            raise ValueError(
                f"{printable_path(folder)} must be written by one encoding at a time; "
                f"{_owner(path)} is writing it. Wait until it ends, or choose another folder."
            )
        time.sleep(POLL_S)
    descriptor, locked = lock
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {now},"
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
        yield locked
    finally:
        # Removed while still locked: after closing, this could remove another process's lock.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")[:200] or "another process"
    return "another process"


def _try_lock(path: Path) -> tuple[int, bool] | None:
    """Returns (descriptor, whether there are locks), or None while another process has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked = _flock(descriptor)
        # If its owner removed the file after it was opened here, this lock is on a deleted file
        # and excludes nobody.
        if locked is not None and is_same_file(descriptor, path):
            return descriptor, locked
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _flock(descriptor: int) -> bool | None:
    """Returns True once locked, None if another process has the lock, False without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False
    return True


class Journal:
    """The folder with the unfinished shards and the progress of an encoding.

    Attributes:
        progress: what `write` stored last, in this process or a stopped one; {} if nothing.
        replaced: whether an encoding of another input or with other options was stopped here.
    """

    def __init__(self, out: Path, key: str, piece_bytes: int, locked: bool):
        """Opens the journal of a stopped encoding, or begins one.

        Args:
            key: identifies the input and the options; journals with another key are removed.
            locked: whether no other process uses `out`; otherwise nothing can be resumed.
        """
        name = key[:16] if locked else f"{key[:16]}-{uuid.uuid4().hex[:8]}"
        self.folder = out / f"{STATE}{name}"
        self._piece_bytes, self._locked = piece_bytes, locked
        self.replaced = False
        for other in out.glob(f"{STATE}*") if locked else ():
            if other.is_dir() and other != self.folder:
                self.replaced |= (other / PROGRESS).exists()
                shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self.progress: dict = self._read()

    def _read(self) -> dict:
        try:
            stored = json.loads((self.folder / PROGRESS).read_text())
            current = (stored["version"], stored["piece_bytes"]) == (VERSION, self._piece_bytes)
            return stored["progress"] if current and isinstance(stored["progress"], dict) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def write(self, progress: dict) -> None:
        """Stores the progress on disk, where the shards that it describes must already be."""
        stored = {"version": VERSION, "piece_bytes": self._piece_bytes, "progress": progress}
        write_atomic(self.folder / PROGRESS, json.dumps(stored))
        self.progress = progress

    def close(self, resumable: bool) -> None:
        """Removes the folder unless it is needed to continue."""
        if not (resumable and self._locked and self.progress):
            shutil.rmtree(self.folder, ignore_errors=True)

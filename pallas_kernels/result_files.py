"""The JSON files of bench, replaced atomically, checked and locked, and the commit in them."""

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Replaces a file atomically: a crash leaves either the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(hidden, "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError as error:  # neither JSON nor, possibly, text
        raise ValueError(f"{path} must have a JSON object; got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must have a JSON object; got {str(value)[:80]}")
    return value


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Locks a file for the block against other processes that call this, and makes its folder.

    The lock is a hidden file beside it. A process that is killed releases its lock.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last owner may have removed the file between the two calls.
            if not (lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def find_commit() -> str:
    """Returns the commit: of the git checkout, or JAXTRAIN_COMMIT, or "unknown".

    The variable serves a machine that has a copy of the files without their history.
    """
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("JAXTRAIN_COMMIT", "unknown")

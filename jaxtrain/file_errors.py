"""Describes file-system errors, such as a full disk, in one line with the path and the reason.

A full disk is reported in three ways: as an OSError that names no file (from write()), as an
OSError that names one (from open()), and in the text of an error from TensorStore, which reads and
writes the arrays of checkpoints.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# An OSError with one of these numbers is about a file even if it names none.
FILE_ERRNOS = {
    getattr(errno, name)
    for name in "EDQUOT EFBIG EIO EISDIR ENAMETOOLONG ENOSPC ENOTDIR EROFS ESTALE".split()
}
TENSORSTORE_CODE = re.compile(r"\[os_error_code='(\d+)'\]|\[OS error (\d+)\b")


@contextlib.contextmanager
def add_path_to_errors(path: str | Path, file: IO | None = None) -> Iterator[None]:
    """Adds `path` to an OSError of the block that names no file, such as one from write().

    Args:
        file: closed if there is an error; otherwise Python would try to flush its buffer later, and
            report that failure as well.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        raise


@contextlib.contextmanager
def keep_first_error(error: BaseException | None) -> Iterator[None]:
    """Suppresses an OSError of a block that closes files because of an earlier `error`, if any.

    A disk that was full when `error` was raised is still full when the last lines are flushed.
    """
    try:
        yield
    except OSError as failure:
        if error is None:
            raise
        logging.debug("while closing: %s", describe_error(failure))


class Appender:
    """Appends to a file so that each write is complete or has no effect, even if the disk fills up.

    Only one process may write to the file. `flush` exists so that writers of other libraries accept
    an Appender as their file.

    Raises:
        OSError: a write failed; the error contains the path.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, data: bytes) -> None:
        written = 0
        with add_path_to_errors(self.path):
            try:
                while written < len(data):
                    written += os.write(self._file, data[written:])
            except OSError:
                if written:  # half a line would make the next one unreadable too
                    os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise

    def flush(self) -> None:
        pass

    def close(self) -> None:
        with add_path_to_errors(self.path):
            os.close(self._file)


def is_file_error(error: BaseException) -> bool:
    """Returns whether the error comes from the file system, not from a socket or a process."""
    return isinstance(error, OSError) and (_has_path(error) or error.errno in FILE_ERRNOS)


def _has_path(error: OSError) -> bool:
    return isinstance(error.filename, str | bytes | os.PathLike)


def describe_error(error: BaseException) -> str:
    """Returns `PATH: reason` for a file-system error, and the text of any other error."""
    if not (isinstance(error, OSError) and is_file_error(error)):
        return str(error)
    reason = error.strerror or str(error)
    if not _has_path(error):
        return f"{reason} (errno {error.errno}; the system names no file)"
    return f"{os.fsdecode(error.filename)}: {reason}{_describe_cause(error.errno, error.filename)}"


def describe_storage_error(error: BaseException, folder: str | Path) -> str | None:
    """Returns `FOLDER: reason` if the file system refused to store or load arrays; else None.

    Args:
        error: raised by Orbax or TensorStore, whose texts are hundreds of characters long.
        folder: the folder that was written to or read from.
    """
    if is_file_error(error):
        return describe_error(error)
    match = TENSORSTORE_CODE.search(str(error))
    if not match:
        return None
    code = int(match[1] or match[2])
    return f"{folder}: {os.strerror(code)}{_describe_cause(code, folder)}"


@contextlib.contextmanager
def exit_on_file_error() -> Iterator[None]:
    """Ends the program with a one-line error on a file-system error. Decorates `main`."""
    try:
        yield
    except OSError as error:
        if not is_file_error(error):
            raise
        sys.exit(f"error: {describe_error(error)}")


def _describe_cause(code: int | None, path: str | bytes | os.PathLike) -> str:
    """Returns a hint in parentheses for an error of this number; "" for most numbers."""
    path = Path(os.fsdecode(path))
    existing = [folder for folder in (path, *path.parents) if folder.exists()]
    if code in (errno.ENOTDIR, errno.EEXIST):
        file = next((parent for parent in existing if not parent.is_dir()), None)
        return f" ({file} is a file, not a folder)" if file else ""
    if code in (errno.EACCES, errno.EPERM):
        return f" (as user {os.geteuid()})"
    if code == errno.ENOSPC and existing:
        # Not the free space, because the unfinished files may have been removed by now.
        with contextlib.suppress(OSError):
            return f" (a disk of {format_megabytes(shutil.disk_usage(existing[0]).total)})"
    return ""


def format_megabytes(size: int) -> str:
    """Returns a number of bytes as `0.4 MB` or `1,204 MB`."""
    mb = size / 1e6
    return f"{mb:.1f} MB" if mb < 10 else f"{mb:,.0f} MB"

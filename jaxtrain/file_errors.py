"""What the operating system refuses to do with files, in one line that names the path and why.

A full disk is the usual case: it comes as an OSError that names no file (from write()), as one that
does (from open()), or as text of TensorStore, which writes and reads the arrays of checkpoints.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
from pathlib import Path

# Refusals of a file system. With these an OSError is about files even if it names none.
OF_FILES = {
    getattr(errno, name)
    for name in "EDQUOT EFBIG EIO EISDIR ENAMETOOLONG ENOSPC ENOTDIR EROFS ESTALE".split()
}
TENSORSTORE_CODE = re.compile(r"\[os_error_code='(\d+)'\]|\[OS error (\d+)\b")


@contextlib.contextmanager
def add_path_to_errors(path, file=None):
    """Adds `path` to an OSError of the block that names no file, as those of write() do.

    Args:
        file: closed with the error; else Python would report later that its buffer is lost.
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
def keep_first_error(error: BaseException | None):
    """Lets no OSError of the block hide `error`, which is why files are being closed, or repeat it.

    A disk that was full when a line was written is full when the last lines are written, too.
    """
    try:
        yield
    except OSError as failure:
        if error is None:
            raise
        logging.debug("while closing: %s", describe_error(failure))


class Appender:
    """Appends to a file, each time all of the data or nothing: a full disk takes a part of a line.

    Only one process may write to the file. `flush` makes it a file object for others.

    Raises:
        OSError: with the path in it.
    """

    def __init__(self, path):
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, data: bytes) -> None:
        written = 0
        with add_path_to_errors(self.path):
            try:
                while written < len(data):
                    written += os.write(self._file, data[written:])
            except OSError:
                if written:  # a part of a line would make the next one unreadable too
                    os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise

    def flush(self) -> None:
        pass

    def close(self) -> None:
        with add_path_to_errors(self.path):
            os.close(self._file)


def is_file_error(error: BaseException) -> bool:
    """Whether an OSError is a file system's refusal: it names a file, or its errno says so."""
    if not isinstance(error, OSError):
        return False
    return isinstance(error.filename, str | bytes | os.PathLike) or error.errno in OF_FILES


def describe_error(error: BaseException) -> str:
    """Returns `PATH: reason` of a file system's refusal, and the text of any other error."""
    if not is_file_error(error):
        return str(error)
    reason = error.strerror or str(error)
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return f"{reason} (errno {error.errno}; the system names no file)"
    return f"{os.fsdecode(error.filename)}: {reason}{_detail(error.errno, error.filename)}"


def describe_storage_error(error: BaseException, folder) -> str | None:
    """Returns `FOLDER: reason` of a write or read of arrays that the file system refused.

    Args:
        error: of Orbax or TensorStore, whose texts are hundreds of characters long.
        folder: that was written to or read.
    """
    if is_file_error(error):
        return describe_error(error)
    found = TENSORSTORE_CODE.search(str(error))
    if not found:
        return None
    code = int(found[1] or found[2])
    return f"{folder}: {os.strerror(code)}{_detail(code, folder)}"


@contextlib.contextmanager
def exit_on_file_error():
    """Ends a program that the file system stops, in one line. Decorates `main` of commands."""
    try:
        yield
    except OSError as error:
        if not is_file_error(error):
            raise
        sys.exit(f"error: {describe_error(error)}")


def _detail(code: int | None, path) -> str:
    path = Path(os.fsdecode(path))
    if code in (errno.ENOTDIR, errno.EEXIST):
        found = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
        return f" ({found} is a file, not a folder)" if found else ""
    if code in (errno.EACCES, errno.EPERM):
        return f" (as user {os.geteuid()})"
    return _size(path) if code == errno.ENOSPC else ""


def _size(path: Path) -> str:
    """` (a disk of 4.2 MB)`: the file system that holds the path; nothing if unknown.

    Not what is free: by now the unfinished files that filled it may be removed.
    """
    nearest = next((p for p in (path, *path.parents) if p.exists()), None)
    try:
        return (
            f" (a disk of {format_megabytes(shutil.disk_usage(nearest).total)})" if nearest else ""
        )
    except OSError:
        return ""


def format_megabytes(size: int) -> str:
    """`0.4 MB`, `1,204 MB`."""
    mb = size / 1e6
    return f"{mb:.1f} MB" if mb < 10 else f"{mb:,.0f} MB"

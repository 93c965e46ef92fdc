"""Files that are whole or not there: whatever stops the writer, a reader sees old or new."""

import contextlib
import json
import math
import os
import shutil
import uuid
from pathlib import Path

from jaxtrain.file_errors import add_path_to_errors


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """A hidden path beside `path`, for a file or a folder that becomes `path` when the block ends.

    It is renamed in one step, on disk before and after; a block that raises leaves nothing behind.
    A writer killed midway leaves only a hidden `.NAME.*.tmp` beside the untouched target.

    Raises:
        OSError: the parent is missing or cannot be written to, or a folder is already at `path`.
    """
    path = Path(path)
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # two writers never share
    try:
        with add_path_to_errors(path):
            yield hidden
            for written in (*hidden.rglob("*"), hidden):
                sync_to_disk(written)  # else a power cut can leave the new name on empty blocks
            os.replace(hidden, path)
    except BaseException as error:
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        elif os.path.lexists(hidden):
            hidden.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(hidden):
            error.filename = str(path)  # the name that the user knows
        raise
    sync_to_disk(path.parent)  # the rename itself


def sync_to_disk(path: str | Path) -> None:
    """Returns once a file, or the names in a folder, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replaces the file by `data` (str as UTF-8) in one rename, durable when it returns.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    with atomic_path(path) as hidden:
        hidden.write_bytes(data.encode() if isinstance(data, str) else data)


def strict_json(value, indent: int | None = None) -> str:
    """JSON that every reader accepts; floats round-trip bit for bit.

    Numbers that JSON does not have become the strings "nan", "inf" and "-inf", which `float()`
    reads back. Scalars of NumPy and JAX become plain numbers.

    Raises:
        TypeError: a value has no JSON form.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, float) and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    return value

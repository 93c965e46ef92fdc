"""Writes files atomically: a reader sees the old or the new content, whatever stops the writer."""

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.file_errors import add_path_to_errors


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a hidden path in the same folder, which is renamed to `path` when the block ends.

    The block writes a file or a folder there. Its content is on disk before the rename, and the
    rename itself before this returns. A block that raises leaves nothing behind. A writer that is
    killed leaves only the hidden `.NAME.*.tmp`.

    Raises:
        OSError: the parent is missing or cannot be written to, or a folder is already at `path`.
    """
    path = Path(path)
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # unique to this writer
    try:
        with add_path_to_errors(path):
            yield hidden
            for written in (*hidden.rglob("*"), hidden):
                sync_to_disk(written)  # else a power cut can leave an empty file at the new name
            os.replace(hidden, path)
    except BaseException as error:
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        elif os.path.lexists(hidden):
            hidden.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(hidden):
            error.filename = str(path)  # the user knows this path, not the hidden one
        raise
    sync_to_disk(path.parent)  # writes the rename to disk


def sync_to_disk(path: str | Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8) in place of a file; it is on disk when this returns.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    with atomic_path(path) as hidden:
        hidden.write_bytes(data.encode() if isinstance(data, str) else data)


def strict_json(value: Any, indent: int | None = None) -> str:
    """Returns JSON that every reader accepts; floats round-trip bit for bit.

    JSON has no NaN or infinity: these become the strings "nan", "inf" and "-inf", which `float()`
    reads back. NumPy and JAX scalars become plain numbers.

    Raises:
        TypeError: a value has no JSON form.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, float) and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    return value

"""Files that are whole or not there: whatever stops the writer, a reader sees old or new."""

import contextlib
import json
import math
import os
import uuid
from pathlib import Path


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replaces the file by `data` (str as UTF-8) in one rename, durable when it returns.

    A writer killed midway leaves only a hidden `.NAME.*.tmp` beside the untouched file.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # two writers never share
    try:
        with open(draft, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on empty blocks
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


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

"""Atomic writes: a reader sees the old file or the new one, never a part."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Replaces a file by one rename, after its content has reached the disk."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file by one rename. Only this user can read it."""
    write_text(path, json.dumps(value), 0o600)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file; {} if there is none, or its folder is a file."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}

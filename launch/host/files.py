"""Files that are whole or not there; JSON ones for this user alone."""

import json
import os
from pathlib import Path


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Replaces the file in one rename."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def write_json(path: Path, value) -> None:
    """Replaces the file in one rename."""
    write_text(path, json.dumps(value), 0o600)


def read_json(path: Path) -> dict:
    """The file's value; {} where there is none."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}

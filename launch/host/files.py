"""JSON files that are whole or not there, for this user alone."""

import json
import os
from pathlib import Path


def write_json(path: Path, value) -> None:
    """Replaces the file in one rename."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def read_json(path: Path) -> dict:
    """The file's value; {} where there is none."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}

"""Hashes code: one digest of the paths, modes and contents of its files."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def hash_files(folder: Path, names: Iterable[str]) -> str:
    """Returns the files' hash, 16 hex digits.

    Args:
        names: paths relative to `folder`. For a symbolic link, the target's path is hashed.
    """
    total = hashlib.sha256()
    for name in sorted(names):
        path = Path(folder) / name
        if path.is_symlink():
            kind, data = "l", os.readlink(path).encode()
        else:
            kind, data = "x" if os.access(path, os.X_OK) else "-", path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        total.update(f"{kind} {digest} {name}\0".encode(errors="surrogateescape"))
    return total.hexdigest()[:16]

"""The name of a tree of files: one hash over their paths, modes and contents."""

import hashlib
import os
from pathlib import Path


def hash_files(folder: Path, files) -> str:
    """16 hex digits. files: paths relative to the folder, links hashed as their targets' names."""
    whole = hashlib.sha256()
    for name in sorted(files):
        path = Path(folder) / name
        if path.is_symlink():
            kind, data = "l", os.readlink(path).encode()
        else:
            kind, data = "x" if os.access(path, os.X_OK) else "-", path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        whole.update(f"{kind} {digest} {name}\0".encode(errors="surrogateescape"))
    return whole.hexdigest()[:16]

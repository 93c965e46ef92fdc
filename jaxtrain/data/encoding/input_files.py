"""Which files are the text: one file, a folder with everything below it, or Python's own source."""

import contextlib
import hashlib
import json
import os
import stat
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np

from jaxtrain.data.encoding.formats import shown
from jaxtrain.data.encoding.roundtrip import Refused

NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Files(list):
    """Sorted (path, name) of each file; `left_out` counts by reason what else a folder holds."""

    def __init__(self, files=(), left_out=None):
        super().__init__(files)
        self.left_out = Counter(left_out or {})


def list_files(source: str, exclude: str | Path, flag: str = "--data.text") -> Files:
    """Sorted (path, name) of a file, of a folder's files, or of Python's own source ("").

    Links to folders are followed, each folder once. Hidden files are left out, and so is the
    folder `exclude`, where the tokens are written. Names are sorted and drawn by their bytes, so
    they need not be UTF-8.

    Args:
        flag: what the user's command calls `source`.

    Raises:
        ValueError: there is no file.
    """
    stdlib = not source
    root = Path(sysconfig.get_path("stdlib") if stdlib else source).expanduser()
    where = f"{shown(source)!r}" + (f", looked in {shown(root)}" if stdlib else "")
    if root.is_file():
        return Files([(root, root.name)])
    if not root.is_dir():
        found = "a pipe or a device" if os.path.exists(root) else "nothing there"
        seen_from = "" if root.is_absolute() else f" (from {shown(Path.cwd())})"
        raise ValueError(
            f"{flag} must be a file or a folder; got {where}, found {found}{seen_from}."
        )
    found, left_out = _walk(root, Path(exclude).resolve(), NOT_SOURCE if stdlib else set())
    if stdlib:  # _sysconfigdata holds one machine's build flags
        found = [
            path
            for path in found
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
        ]
    if not found:
        more = "".join(f", {count:,} {reason}" for reason, count in sorted(left_out.items()))
        raise ValueError(f"{flag} must be a folder that holds files; got {where} with none{more}.")
    named = [(path, path.relative_to(root).as_posix()) for path in found]
    return Files(sorted(named, key=lambda pair: os.fsencode(pair[1])), left_out)


def _walk(root, exclude, hidden):
    """(paths of files, Counter of the rest); folders behind links come after all real ones."""
    found, left_out, seen = [], Counter(), set()
    folders, linked = [root], []
    while folders or linked:
        if not folders:
            linked.sort(key=os.fsencode)
            folders.append(linked.pop(0))
        folder = folders.pop()
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError:
            left_out["unreadable folders"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            left_out["links to folders that are read already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = Path(folder, entry.name)
            if entry.name[0] == "." or entry.name in hidden:
                continue
            try:
                mode = entry.stat().st_mode
            except OSError:
                left_out["broken links"] += 1
                continue
            if stat.S_ISREG(mode):
                found.append(path)
            elif not stat.S_ISDIR(mode):
                left_out["pipes, sockets or devices"] += 1
            elif path.resolve() != exclude:
                (linked if entry.is_symlink() else folders).append(path)
    return found, left_out


def stamps(files) -> np.ndarray:
    """Returns the size and the time of each file, [files, 2]; -1 where it cannot be asked for."""
    out = np.full((len(files), 2), -1, np.int64)
    for i, (path, _) in enumerate(files):
        with contextlib.suppress(OSError):
            status = path.stat()
            out[i] = status.st_size, status.st_mtime_ns
    return out


def check_unchanged(files, before: np.ndarray) -> None:
    """Raises Refused where a file's size or time differs from what `stamps` returned before."""
    changed = np.flatnonzero((stamps(files) != before).any(axis=1))
    if changed.size:
        more = f" and {changed.size - 1:,} more" if changed.size > 1 else ""
        raise Refused(
            "the input must not change while it is encoded; "
            f"{shown(files[changed[0]][0])}{more} did. Run the same command again."
        )


def source_key(files, *options) -> str:
    """32 hex digits that change when a file's name, size or time does, or an option."""
    digest = hashlib.sha256(json.dumps(options).encode())
    for path, name in files:
        status = path.stat()
        digest.update(os.fsencode(f"\n{name}\0{status.st_size}\0{status.st_mtime_ns}"))
    return digest.hexdigest()[:32]

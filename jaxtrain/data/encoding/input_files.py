"""Lists the files of the input: one file, all files below a folder, or Python's own source."""

import contextlib
import hashlib
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxtrain.data.encoding.formats import printable_path
from jaxtrain.data.encoding.roundtrip import UnusableInput

NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class InputFiles(list[tuple[Path, str]]):
    """Sorted (path, name) of each file; `left_out` counts, by reason, the entries left out."""

    def __init__(self, files: Iterable[tuple[Path, str]], left_out: Counter | None = None):
        super().__init__(files)
        self.left_out = Counter(left_out or {})


def list_files(source: str, exclude: str | Path, flag: str = "--data.text") -> InputFiles:
    """Returns a file, the files below a folder, or the files of Python's own source ("").

    Links to folders are followed, each folder once. Hidden files are left out, and so is the
    folder `exclude`, where the tokens are written. Names are sorted by their bytes, so they need
    not be UTF-8.

    Args:
        flag: the command-line flag of `source`, for errors.

    Raises:
        ValueError: there is no file.
    """
    stdlib = not source
    root = Path(sysconfig.get_path("stdlib") if stdlib else source).expanduser()
    where = repr(printable_path(source))
    if stdlib:
        where += f", for Python's own source in {printable_path(root)}"
    if root.is_file():
        return InputFiles([(root, root.name)])
    if not root.is_dir():
        problem = "is a pipe or a device" if os.path.exists(root) else "does not exist"
        if not root.is_absolute():
            problem += f" in {printable_path(Path.cwd())}"
        raise ValueError(f"{flag} must be a file or a folder; got {where}, which {problem}.")
    paths, left_out = _walk(root, Path(exclude).resolve(), NOT_SOURCE if stdlib else set())
    if stdlib:  # _sysconfigdata holds the build flags of one machine
        paths = [
            path
            for path in paths
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
        ]
    if not paths:
        more = "".join(f", {count:,} {reason}" for reason, count in sorted(left_out.items()))
        raise ValueError(f"{flag} must be a folder with files in it; got {where} with none{more}.")
    named = [(path, path.relative_to(root).as_posix()) for path in paths]
    return InputFiles(sorted(named, key=lambda pair: os.fsencode(pair[1])), left_out)


def _walk(root: Path, exclude: Path, ignored: set[str]) -> tuple[list[Path], Counter]:
    """Returns the files below a folder, and counts of what was left out, by reason.

    Folders behind links come after all real ones: a folder that is reached both ways is read under
    its real name.
    """
    paths, left_out, seen = [], Counter(), set()
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
            if entry.name[0] == "." or entry.name in ignored:
                continue
            try:
                mode = entry.stat().st_mode
            except OSError:
                left_out["broken links"] += 1
                continue
            if stat.S_ISREG(mode):
                paths.append(path)
            elif not stat.S_ISDIR(mode):
                left_out["pipes, sockets or devices"] += 1
            elif path.resolve() != exclude:
                (linked if entry.is_symlink() else folders).append(path)
    return paths, left_out


def file_stamps(files: InputFiles) -> np.ndarray:
    """Returns the size and the modification time of each file, int64 [files, 2]; -1 if unknown."""
    stamps = np.full((len(files), 2), -1, np.int64)
    for i, (path, _) in enumerate(files):
        with contextlib.suppress(OSError):
            status = path.stat()
            stamps[i] = status.st_size, status.st_mtime_ns
    return stamps


def check_unchanged(files: InputFiles, before: np.ndarray) -> None:
    """Raises UnusableInput if a file's size or time is no longer what file_stamps returned."""
    changed = np.flatnonzero((file_stamps(files) != before).any(axis=1))
    if changed.size:
        more = f" and {changed.size - 1:,} more" if changed.size > 1 else ""
        raise UnusableInput(
            "the input must not change while it is encoded; "
            f"{printable_path(files[changed[0]][0])}{more} did. Run the same command again."
        )


def input_key(files: InputFiles, *options) -> str:
    """Returns 32 hex digits that change with any file's name, size or time and with any option."""
    digest = hashlib.sha256(json.dumps(options).encode())
    for path, name in files:
        status = path.stat()
        digest.update(os.fsencode(f"\n{name}\0{status.st_size}\0{status.st_mtime_ns}"))
    return digest.hexdigest()[:32]

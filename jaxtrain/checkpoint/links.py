"""Copies a stored step into another folder, without a second copy of its bytes where possible."""

import os
import shutil
from pathlib import Path


def link_tree(source: Path, target: Path, hidden: bool = True) -> None:
    """Creates `target` with the files of `source`, as hard links where the file system has them.

    Complete checkpoints and shards are never changed in place, only replaced or deleted, which a
    hard link outlives. The caller makes the result appear at once, see files.atomic_path.

    Args:
        hidden: whether hidden files and folders are copied too.

    Raises:
        OSError: `target` exists, a file cannot be read, or the disk is full.
    """
    ignore = None if hidden else shutil.ignore_patterns(".*")
    shutil.copytree(source, target, ignore=ignore, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)

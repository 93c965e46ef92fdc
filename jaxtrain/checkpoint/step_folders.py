"""Lists and moves the folders of steps, which are named by the steps' numbers."""

import os
from collections.abc import Iterable
from pathlib import Path


def list_steps(folder: Path) -> list[int]:
    """Returns the steps stored in a folder, smallest first; [] if it does not exist."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def set_aside(folder: Path, steps: Iterable[int]) -> None:
    """Moves steps to checkpoints_rejected beside their folder, under names that are not taken."""
    aside = folder.parent / "checkpoints_rejected"
    aside.mkdir(exist_ok=True)
    for step in steps:
        names = [str(step)] + [f"{step}.{k}" for k in range(1, 1_000)]
        free = next(name for name in names if not (aside / name).exists())
        os.rename(folder / str(step), aside / free)

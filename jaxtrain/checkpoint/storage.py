"""The table of the ways to store checkpoints."""

from pathlib import Path

from jaxtrain.checkpoint.process0_store import Process0Store
from jaxtrain.checkpoint.shared_store import SharedStore

STORAGE = {"shared": SharedStore, "host0": Process0Store}


def open_storage(
    name: str, folder: Path, keep_last: int, keep_every: int
) -> SharedStore | Process0Store:
    """Returns the store that writes and reads the steps in a folder.

    Raises:
        ValueError: `name` is not a key of STORAGE, keep_last is below 1, keep_every is negative, or
            one of the two is not an integer.
    """
    counts = f"keep_last={keep_last!r}, keep_every={keep_every!r}"
    if not isinstance(keep_last, int) or not isinstance(keep_every, int):
        raise ValueError(f"keep_last and keep_every must be integers; got {counts}.")
    if keep_last < 1 or keep_every < 0:
        raise ValueError(
            f"keep_last must be at least 1 and keep_every at least 0 (none); got {counts}."
        )
    if name not in STORAGE:
        raise ValueError(f"storage must be {' or '.join(STORAGE)}; got {name!r}.")
    return STORAGE[name](folder, keep_last, keep_every)

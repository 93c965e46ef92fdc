"""Units of reading, and the tasks that they are cut into for the encoding processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxtrain.data.encoding.documents import Piece, Problem, first_line


@dataclass(frozen=True)
class Unit:
    """A part of the input that is read from its beginning; resuming skips whole units.

    Its pieces are known where the file can be read at any place; else a reader makes them.
    """

    kind: str  # pieces, text, jsonl, json, csv, parquet, arrow or problem
    size: int  # bytes on disk
    pieces: tuple[Piece, ...] = ()
    path: str = ""
    name: str = ""
    compression: str = ""
    group: int = 0  # of a parquet file's rows
    row: int = 0  # the group's first
    problem: Problem | None = None


class Task(NamedTuple):
    """Pieces for one process, or a problem that the reader met."""

    pieces: tuple[Piece, ...]
    size: int  # bytes on disk, for the progress bar
    problem: Problem | None = None
    lost_bytes: int = 0  # on disk, that the problem costs
    after: tuple[int, int] = (0, 0)  # the unit, and the tasks of it that end with this one


def damage(path, error, at=0, kind="", compression="", what="the file") -> Problem:
    """Returns the Problem of what reading a file raised."""
    unreadable = isinstance(error, OSError) and error.errno
    found = f"{what} cannot be read: {error.strerror if unreadable else first_line(error)}"
    return Problem(path, kind, compression, at, "unreadable" if unreadable else "damaged", found)


def tasks_of_rows(unit: Unit, kind: str, rows, piece_bytes: int, position) -> Iterator[Task]:
    """Yields tasks of about piece_bytes out of (place, bytes, None or Bad) of each document.

    A Problem among the rows becomes a task of its own, in its place.

    Args:
        position: tells how far the file on disk is read, in bytes.
    """
    held, size, before = [], 0, 0

    def task(problem=None):
        nonlocal held, size, before
        pieces = ()
        if held:
            first, last = held[0][0], held[-1][0] + 1
            pieces = (Piece(unit.path, unit.name, first, last, kind, content=held),)
        done, before, held, size = position() - before, position(), [], 0
        return Task(pieces, done, problem)

    for row in rows:
        if isinstance(row, Problem):
            if held:
                yield task()
            yield task(row)
            continue
        held.append(row)
        size += len(row[1]) if isinstance(row[1], bytes) else 0
        if size >= piece_bytes or len(held) >= piece_bytes:
            yield task()
    if held:
        yield task()

"""The parts into which the input is divided for encoding, and the problems found in them.

The input is a list of units, read one after the other. A reader cuts a unit into tasks, each for
one encoding process. A task consists of pieces, each of one file. A piece contains documents or a
part of one. A stopped encoding continues after the last task that was finished.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxtrain.data.encoding.formats import DAMAGE, line_number, printable_path

PIECE_BYTES = 1 << 20
MAX_LINE_COUNT_BYTES = 1 << 30  # past this byte, problems are reported without a line number


class BadDocument(NamedTuple):
    """Why a document cannot be used."""

    reason: str  # the category it is counted in
    found: str


class DocumentProblem(NamedTuple):
    """A document, or the rest of a file, that could not be used."""

    path: str
    kind: str  # decides what `place` is: a row for "rows", nothing for "", otherwise a byte
    compression: str
    place: int
    reason: str
    found: str

    def describe(self) -> str:
        """Returns a line with the file, the line or row, the byte, and what was found there."""
        where = printable_path(self.path)
        if self.kind == "rows":
            where += f", row {self.place:,}"
        elif self.kind:
            line = ""
            if self.kind == "jsonl" and self.place < MAX_LINE_COUNT_BYTES:
                with contextlib.suppress(*DAMAGE):
                    line = f"line {line_number(self.path, self.compression, self.place):,}, "
            where += f", {line}byte {self.place:,}"
        return f"{where}: {self.found}"


Row = tuple[int, bytes | BadDocument | None]  # (place in the file, the document's content)


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes or rows of a file, which one process encodes."""

    path: str
    name: str  # path below the input folder, the same on every machine
    start: int
    stop: int
    kind: str = "text"  # text, jsonl, json or rows
    compression: str = ""
    split: str = "train"  # of a text; the split of other documents is decided one by one
    first: bool = True  # whether a text starts here
    # What a reader has already read: bytes of a text or of lines, or rows of json or a table. If it
    # is None, the encoding process reads it from the file. A text's content includes its context.
    content: bytes | list[Row] | None = None
    before: int = 0  # bytes of a text before `start` that are encoded with it, see cut_points
    after: int = 0

    def rows(self) -> list[Row]:
        """Returns the documents of a piece of json or rows."""
        assert isinstance(self.content, list)
        return self.content


@dataclass(frozen=True)
class Unit:
    """A part of the input that can only be read from its beginning.

    If its file can be read at any place, its pieces are known; otherwise a reader makes them.
    """

    kind: str  # pieces, text, jsonl, json, csv, parquet, arrow or problem
    size: int  # bytes on disk
    pieces: tuple[Piece, ...] = ()
    path: str = ""
    name: str = ""
    compression: str = ""
    group: int = 0  # row group of a parquet file
    row: int = 0  # first row of the group
    problem: DocumentProblem | None = None


class Task(NamedTuple):
    """Pieces for one process, or a problem that the reader encountered."""

    pieces: tuple[Piece, ...]
    size: int  # bytes on disk, for the progress bar
    problem: DocumentProblem | None = None
    lost_bytes: int = 0  # on disk, lost with the problem
    after: tuple[int, int] = (0, 0)  # where to continue: (number of the unit, its tasks done)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its type if the text is empty."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def damage_problem(
    path: str,
    error: Exception,
    place: int = 0,
    kind: str = "",
    compression: str = "",
    what: str = "the file",
) -> DocumentProblem:
    """Turns an error in reading a file into a problem."""
    reason, text = "damaged", first_line(error)
    if isinstance(error, OSError) and error.errno:  # the operating system's, not a decoder's
        reason, text = "unreadable", error.strerror
    return DocumentProblem(path, kind, compression, place, reason, f"{what} cannot be read: {text}")


def group_rows(
    unit: Unit,
    kind: str,
    rows: Iterable[Row | DocumentProblem],
    piece_bytes: int,
    position: Callable[[], int],
) -> Iterator[Task]:
    """Yields tasks of about piece_bytes of rows; a problem among them becomes its own task.

    Args:
        position: returns how many bytes of the file on disk have been read.
    """
    group: list[Row] = []
    size = before = 0

    def next_task(problem: DocumentProblem | None = None) -> Task:
        nonlocal group, size, before
        pieces = ()
        if group:
            first, last = group[0][0], group[-1][0] + 1
            pieces = (Piece(unit.path, unit.name, first, last, kind, content=group),)
        read, before = position() - before, position()
        group, size = [], 0
        return Task(pieces, read, problem)

    for row in rows:
        if isinstance(row, DocumentProblem):
            if group:
                yield next_task()
            yield next_task(row)
            continue
        group.append(row)
        size += len(row[1]) if isinstance(row[1], bytes) else 0
        if size >= piece_bytes or len(group) >= piece_bytes:  # empty rows have no size
            yield next_task()
    if group:
        yield next_task()

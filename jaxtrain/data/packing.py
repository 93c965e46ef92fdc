"""Packs documents into rows of a fixed number of tokens, with little padding.

Best-fit decreasing takes the documents from the longest to the shortest and puts each into the row
with the least room that it still fits into. Documents of one length are interchangeable, so they
are placed together, into groups of rows with equal room: the work grows with the number of
distinct lengths, not with rows x documents.

Source: Johnson 1973, "Near-optimal bin packing algorithms", https://dspace.mit.edu/handle/1721.1/57819
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Packing(NamedTuple):
    """The pieces of documents in each row, sorted by row and then by place in the row."""

    shard: np.ndarray  # [pieces] int32: the shard that holds a piece
    start: np.ndarray  # [pieces] int64: its first token in that shard
    length: np.ndarray  # [pieces] int32, at least 1
    first: np.ndarray  # [rows + 1] int64: row r holds pieces first[r]:first[r + 1]

    @property
    def rows(self) -> int:
        return len(self.first) - 1


def best_fit(lengths: ArrayLike, room: int) -> np.ndarray:
    """Returns the row of each piece, [pieces] int64; lengths must be in 1..room."""
    lengths = np.asarray(lengths)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= room), "cut pieces first"
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    buckets: dict[int, list[np.ndarray]] = {}  # room left -> groups of rows, oldest first
    # Bit r is set while bucket r has rows: a shift and the lowest set bit find the fullest row
    # that still has room for a piece.
    open_rooms = 0
    rows = taken = 0

    def add_to_bucket(room_left: int, group: np.ndarray) -> None:
        nonlocal open_rooms
        if room_left and group.size:
            buckets.setdefault(room_left, []).append(group)
            open_rooms |= 1 << room_left

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        pieces = order[taken : taken + count]
        taken += count
        while pieces.size and (fitting := open_rooms >> size):
            best = size + (fitting & -fitting).bit_length() - 1
            group = buckets[best].pop(0)
            if not buckets[best]:
                open_rooms &= ~(1 << best)
            group, rest = group[: pieces.size], group[pieces.size :]
            row_of[pieces[: group.size]] = group
            pieces = pieces[group.size :]
            if rest.size:
                buckets[best].insert(0, rest)
                open_rooms |= 1 << best
            add_to_bucket(best - size, group)
        if pieces.size:  # no open row has room: start new rows, filled with this size
            per_row = room // size
            row_of[pieces] = rows + np.arange(pieces.size) // per_row
            full_rows, left_over = divmod(pieces.size, per_row)
            add_to_bucket(room - per_row * size, np.arange(rows, rows + full_rows))
            rows += full_rows
            if left_over:
                add_to_bucket(room - left_over * size, np.array([rows]))
                rows += 1
    return row_of


def pack(documents: tuple[ArrayLike, ArrayLike, ArrayLike], room: int) -> Packing:
    """Packs documents into rows of at most `room` tokens, each token in exactly one of them.

    Args:
        documents: (shard [N], start [N], length [N]); a document longer than a row is cut into
            whole rows and a rest.
    """
    shard, start, length = (np.asarray(x, np.int64) for x in documents)
    pieces = -(-length // room)  # per document
    part = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    shard, start = np.repeat(shard, pieces), np.repeat(start, pieces) + part * room
    length = np.minimum(np.repeat(length, pieces) - part * room, room)
    row_of = best_fit(length, room)
    order = np.lexsort((start, shard, row_of))
    first = np.searchsorted(row_of[order], np.arange(row_of.max(initial=-1) + 2))
    return Packing(
        shard[order].astype(np.int32), start[order], length[order].astype(np.int32), first
    )

"""Best-fit packing: documents into rows of fixed room, with as little padding as is practical.

Best-fit decreasing puts each document, longest first, into the fullest row that still holds it.
Documents of one length are interchangeable, so whole groups move between buckets of rows with
equal room left: the work grows with the number of distinct lengths, not with rows x documents.

Source: Johnson 1973, "Near-optimal bin packing algorithms", https://dspace.mit.edu/handle/1721.1/57819
"""

from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Pieces of documents, sorted by row and then by place in the row."""

    shard: np.ndarray  # [pieces] int32: where a piece is read
    start: np.ndarray  # [pieces] int64: its first token in that shard
    length: np.ndarray  # [pieces] int32, at least 1
    first: np.ndarray  # [rows + 1] int64: row r holds pieces first[r]:first[r + 1]

    @property
    def rows(self) -> int:
        return len(self.first) - 1


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece. [pieces] lengths in 1..room -> [pieces] int64, rows from 0"""
    lengths = np.asarray(lengths)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= room), "cut pieces first"
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    buckets: dict[int, list[np.ndarray]] = {}  # room left -> groups of rows, oldest first
    open_rooms = 0  # bit r is set while bucket r has rows
    rows = taken = 0

    def leave(room_left, group):
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
            leave(best - size, group)
        if pieces.size:  # none fits: new rows, each filled with this size before the next
            each = room // size
            fresh = rows + np.arange(pieces.size) // each
            row_of[pieces] = fresh
            full, over = divmod(pieces.size, each)
            leave(room - each * size, np.arange(rows, rows + full))
            leave(room - over * size, np.arange(rows + full, rows + full + bool(over)))
            rows += full + bool(over)
    return row_of


def pack(documents, room: int) -> Packing:
    """Rows of at most `room` tokens that hold every token exactly once.

    Args:
        documents: (shard [N], start [N], length [N]); one longer than a row is cut into whole
            rows and a rest.
    """
    shard, start, length = (np.asarray(x, np.int64) for x in documents)
    cuts = -(-length // room)
    part = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    shard, start = np.repeat(shard, cuts), np.repeat(start, cuts) + part * room
    length = np.minimum(np.repeat(length, cuts) - part * room, room)
    row_of = best_fit(length, room)
    order = np.lexsort((start, shard, row_of))
    first = np.searchsorted(row_of[order], np.arange(row_of.max(initial=-1) + 2))
    return Packing(
        shard[order].astype(np.int32), start[order], length[order].astype(np.int32), first
    )

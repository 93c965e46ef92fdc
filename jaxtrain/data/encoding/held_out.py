"""Decides which documents are held out for validation.

The decision depends only on a hash of the file's name and of the document's place in the file, so
it is the same on every machine and for any number of processes. Whole text files are held out
until they make up the wanted share of the bytes. If that is less than half of the share, the end
of the largest file is held out too. Lines and rows are held out one by one.
"""

import hashlib
import os
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from jaxtrain.data.encoding.cut_points import WINDOW_BYTES, find_cut, find_cut_near_end
from jaxtrain.data.encoding.formats import read_at
from jaxtrain.data.encoding.work_units import Piece

SPLITS = ("train", "val")
# split -> (hash, name, place) of the document in it whose hash is nearest to the other split.
Nearest = dict[str, tuple[float, str, int]]


class ForcedSplit(NamedTuple):
    """A document that goes to a split whatever its hash, so that no split stays empty."""

    name: str
    place: int
    split: str  # "cut": its first part goes to train, its last to val


def unit_hash(name: str) -> float:
    """Returns a number in [0, 1) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def merge_nearest(nearest: Nearest, other: Nearest) -> None:
    """Updates `nearest` with the documents of `other` that are nearer to the other split."""
    for split, document in other.items():
        nearer = min if split == "train" else max
        nearest[split] = nearer(nearest.get(split, document), document)


def find_forced(documents: Counter, nearest: Nearest, val_fraction: float) -> ForcedSplit | None:
    """Returns the document that must change its split because the other split is empty.

    It is the one whose hash is nearest to the other split. If it is the only document, it is cut.
    """
    filled = [split for split in SPLITS if documents[split]]
    if not val_fraction or len(filled) != 1 or filled[0] not in nearest:
        return None
    _, name, place = nearest[filled[0]]
    other = "val" if filled == ["train"] else "train"
    return ForcedSplit(name, place, other if documents[filled[0]] > 1 else "cut")


def hold_out_texts(texts: list[Piece], fraction: float) -> list[list[Piece]]:
    """Returns the parts of each text, usually only one, each assigned to a split."""
    target = fraction * sum(piece.stop for piece in texts)
    held_out, taken = set(), 0
    for piece in sorted(texts, key=lambda piece: unit_hash(piece.name)):
        if taken + piece.stop <= target:
            held_out.add(piece.name)
            taken += piece.stop
    parts = {p.name: [replace(p, split="val") if p.name in held_out else p] for p in texts}
    if target and taken < target / 2:
        largest = max((p for p in texts if p.name not in held_out), key=lambda p: p.stop)
        cut = _find_cut_in_file(largest, max(1, round(target - taken)))
        if largest.start < cut < largest.stop:
            last = replace(largest, start=cut, split="val")
            parts[largest.name] = [replace(largest, stop=cut), last]
        elif not held_out and len(texts) > 1:  # no text is long enough to be cut
            first = min(texts, key=lambda p: unit_hash(p.name))
            parts[first.name] = [replace(first, split="val")]
    return [parts[piece.name] for piece in texts]


def _find_cut_in_file(piece: Piece, wanted: int) -> int:
    """Returns where to cut a text so that about `wanted` bytes follow."""
    position = max(piece.start, piece.stop - wanted)
    window = read_at(piece.path, piece.compression, position, WINDOW_BYTES)
    cut = position + find_cut(window)
    if cut < piece.stop and piece.stop - cut >= wanted / 2:
        return cut
    start = max(piece.start, piece.stop - max(WINDOW_BYTES, 2 * wanted))
    tail = read_at(piece.path, piece.compression, start, piece.stop - start)
    return start + find_cut_near_end(tail, wanted)

"""Draws by name: which split a document goes to, the same on every machine."""

import hashlib
import os


def draw(name: str) -> float:
    """Returns a number in [0, 1) that belongs to the name, on every machine."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def merge_drawn(drawn: dict, other: dict) -> None:
    """Keeps, for each split, the row whose draw is nearest to the other split's."""
    for split, found in other.items():
        nearest = min if split == "train" else max
        drawn[split] = nearest(tuple(drawn.get(split, found)), tuple(found))

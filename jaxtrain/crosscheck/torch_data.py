"""Reads batches from token shards for the PyTorch side, in the order that jaxtrain documents.

This is an independent implementation of that order. Row r of a shard is the T+1 tokens from r*T.
Batch n has rows n*B ... n*B+B-1 of an endless sequence of epochs. Each epoch shuffles the rows of
all shards by a Feistel network on a grid of about sqrt(rows) by sqrt(rows) cells; a cell past the
last row is mapped again until the result is a row (cycle walking).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

WIDTHS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by llm.c's (magic, version)
HEADER_BYTES = 1_024
ROUNDS = 10
MASK = (1 << 64) - 1


def read_shard(path: str | Path) -> np.ndarray:
    """Maps the tokens of an llm.c file into memory.

    Raises:
        ValueError: the file has another format or length.
    """
    magic, version, count = np.fromfile(path, "<i4", 3).tolist()
    if (magic, version) not in WIDTHS:
        raise ValueError(
            f"the PyTorch side reads llm.c's token files; {path} starts with {magic}, {version}. "
            "Encode the text with `python -m jaxtrain.data.encode`, or give --batches=TRACE."
        )
    tokens = np.memmap(path, WIDTHS[magic, version], "r", HEADER_BYTES)
    if len(tokens) != count:
        raise ValueError(f"{path} must have {count} tokens by its header; got {len(tokens)}.")
    return tokens


def _hash(x: int) -> int:
    """Hashes a 64-bit integer by MurmurHash3's finaliser."""
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return x ^ (x >> 33)


def shuffled(index: int, rows: int, seed: int, epoch: int) -> int:
    """Returns the row that an epoch reads at place `index`."""
    root = _hash((seed + 0x9E3779B97F4A7C15) & MASK)
    root = _hash(root ^ _hash((epoch + 0xD1B54A32D192ED03) & MASK))
    keys = [_hash((root + n * 0x9E3779B97F4A7C15) & MASK) for n in range(1, ROUNDS + 1)]
    width = math.isqrt(rows - 1) + 1
    height = -(-rows // width)
    while True:
        row, column = divmod(index, width)
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            row = (row + _hash(column ^ first) % height) % height
            column = (column + _hash(row ^ second) % width) % width
        index = row * width + column
        if index < rows:
            return index


def shard_batches(
    paths: Sequence[str | Path], B: int, T: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the batches of token shards without end, {"tokens": int64 [B,T+1]}."""
    shards = [read_shard(path) for path in paths]
    starts = [(shard, start) for shard in shards for start in range(0, len(shard) - T, T)]
    for n in itertools.count():
        rows = []
        for place in range(n * B, n * B + B):
            epoch, index = divmod(place, len(starts))
            shard, start = starts[shuffled(index, len(starts), seed, epoch)]
            rows.append(shard[start : start + T + 1].astype(np.int64))
        yield {"tokens": torch.from_numpy(np.stack(rows))}

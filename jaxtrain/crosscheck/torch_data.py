"""The twin's batches, read from the token shards by its own code: the order that README names.

Row r of the data is the T+1 tokens from r*T, counted within shards. Batch n holds rows n*B ...
n*B+B-1 of an endless sequence of epochs, each a shuffle of all rows by a Feistel network over a
grid of about sqrt(rows) by sqrt(rows) cells; cells past the rows are walked again.
"""

import itertools
import math

import numpy as np
import torch

WIDTHS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # llm.c's (magic, version) of token files
HEADER_BYTES = 1_024
ROUNDS = 10
MASK = (1 << 64) - 1


def read_shard(path) -> np.ndarray:
    """Tokens [tokens] of an llm.c file.

    Raises:
        ValueError: the file is of another format or length.
    """
    magic, version, count = np.fromfile(path, "<i4", 3).tolist()
    if (magic, version) not in WIDTHS:
        raise ValueError(
            f"the twin reads llm.c's token files; {path} starts with {magic}, {version}. Encode "
            "the text with `python -m jaxtrain.data.encode`, or give --batches=TRACE."
        )
    tokens = np.memmap(path, WIDTHS[magic, version], "r", HEADER_BYTES)
    if len(tokens) != count:
        raise ValueError(f"{path} must hold {count} tokens by its header; got {len(tokens)}.")
    return tokens


def _hash(x: int) -> int:
    """MurmurHash3's 64-bit finaliser."""
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return x ^ (x >> 33)


def shuffled(index: int, rows: int, seed: int, epoch: int) -> int:
    """Where place `index` of an epoch is read from."""
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


def shard_batches(paths, B, T, seed):
    """Endless batches of token shards, {"tokens": int64 [B,T+1]}."""
    shards = [read_shard(path) for path in paths]
    starts = [(shard, at) for shard in shards for at in range(0, len(shard) - T, T)]
    for n in itertools.count():
        rows = []
        for place in range(n * B, n * B + B):
            epoch, index = divmod(place, len(starts))
            shard, at = starts[shuffled(index, len(starts), seed, epoch)]
            rows.append(shard[at : at + T + 1].astype(np.int64))
        yield {"tokens": torch.from_numpy(np.stack(rows))}

"""Shuffles an epoch: a keyed permutation of range(n), computed for each index without a table.

An index is a pair (i, j) in a grid of about sqrt(n) x sqrt(n). Each round adds a hash of one
coordinate to the other, which is invertible, so all rounds together are a bijection of the grid.
The grid has slightly more than n cells: an index that lands past n is shuffled again until it
lands below n.

Source: Black & Rogaway 2002, https://www.cs.ucdavis.edu/~rogaway/papers/subset.pdf (generalised
Feistel and cycle walking); the hash is MurmurHash3's 64-bit finaliser (Appleby, public domain).
"""

import functools
import math

import numpy as np

ROUNDS = 10  # with 4, n > 1e6 has a lag-1 correlation of 0.3-0.5; with 8 or more, none
MASK = 2**64 - 1
MURMUR_FACTORS = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads consecutive integers


def _mix(x: np.ndarray) -> np.ndarray:
    """Hashes uint64 values: a flipped input bit flips each output bit with probability 1/2."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(MURMUR_FACTORS[0])
    x = (x ^ (x >> np.uint64(33))) * np.uint64(MURMUR_FACTORS[1])
    return x ^ (x >> np.uint64(33))


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """Returns the keys of an epoch's rounds, [ROUNDS] uint64."""
    root = _mix(np.array([seed & MASK], np.uint64) + GOLDEN)
    root = _mix(root ^ _mix(np.array([epoch & MASK], np.uint64) + np.uint64(0xD1B54A32D192ED03)))
    steps = np.arange(1, ROUNDS + 1, dtype=np.uint64) * GOLDEN
    return _mix(root + steps)


def _shuffle_grid(
    x: np.ndarray, rows: np.uint64, columns: np.uint64, keys: np.ndarray
) -> np.ndarray:
    """Applies all rounds once to cells x < rows * columns. [N] uint64 -> [N] uint64"""
    i, j = np.divmod(x, columns)
    for r in range(0, ROUNDS, 2):
        i = (i + _mix(j ^ keys[r]) % rows) % rows
        j = (j + _mix(i ^ keys[r + 1]) % columns) % columns
    return i * columns + j


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns each index's image under the permutation of `epoch`, [N] int64 in [0, n).

    Raises:
        ValueError: an index lies outside [0, n), or n is past 2^62.
    """
    index = np.asarray(index, np.int64)
    if not 0 < n <= 2**62 or (index.size and not (index.min() >= 0 and index.max() < n)):
        raise ValueError(f"indices must lie in [0, n) with 0 < n <= 2**62; got n={n}.")
    columns = math.isqrt(n - 1) + 1
    rows = -(-n // columns)
    rows, columns, limit = np.uint64(rows), np.uint64(columns), np.uint64(n)
    keys = _round_keys(seed, epoch)
    x = _shuffle_grid(index.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(x >= limit)
    # This loop ends: a bijection consists of cycles, so an index that started below n returns to
    # an index below n if it is shuffled often enough (cycle walking).
    while outside.size:
        x[outside] = _shuffle_grid(x[outside], rows, columns, keys)
        outside = outside[x[outside] >= limit]
    return x.astype(np.int64)


def shuffled_epochs(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Returns the items at positions of an endless list of epochs, [N] int64 in [0, n).

    Each epoch holds all n items, in its own order.
    """
    epochs, indices = np.divmod(positions, n)
    shuffled = np.empty_like(indices)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        shuffled[inside] = permute(indices[inside], n, seed, int(epoch))
    return shuffled

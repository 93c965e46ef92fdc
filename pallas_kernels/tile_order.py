"""Masking constants, and the order in which programs visit tiles: shared by Triton and Mosaic."""

import jax.numpy as jnp

# -inf would make nan: exp(-inf - -inf) in a row or tile where everything is masked.
MASKED = -1e30
# The log-sum-exp of a row that attends to nothing: its probabilities become exp(-1e30) = 0.
EMPTY_ROW_LSE = 1e30


def grouped_tile(p, blocks, tiles, group):
    """Returns (row block, vocabulary tile) of program p.

    `group` blocks of rows walk the vocabulary together, so that they share its tiles in cache.
    """
    first = p // (group * tiles) * group
    here = jnp.minimum(blocks - first, group)
    within = p % (group * tiles)
    return first + within % here, within // here


def triangle_tile(p):
    """Returns (row, column) of tile p of a lower triangle, counted row by row."""
    row = ((jnp.sqrt(8.0 * p.astype(jnp.float32) + 1.0) - 1.0) / 2.0).astype(jnp.int32)
    row = jnp.where(row * (row + 1) // 2 > p, row - 1, row)  # float32 may be off by one
    row = jnp.where((row + 1) * (row + 2) // 2 <= p, row + 1, row)
    return row, p - row * (row + 1) // 2

"""Constants and the order in which programs visit tiles, shared by all kernel bodies."""

import math

import jax
import jax.numpy as jnp

# Not -inf: a row or tile where everything is masked would compute exp(-inf - -inf) = nan.
MASKED = -1e30
# The initial maximum of a row of scores: below every real score, yet so far above MASKED that
# exp(MASKED - LOWEST) is 0 even in a row whose scores so far are all masked.
LOWEST = MASKED / 10
# Stored as the log-sum-exp of a query that sees no key: its probabilities become exp(-1e30) = 0.
EMPTY_ROW_LSE = 1e30
LOG2E = math.log2(math.e)
MOST = 2.0**96  # of an exponential of the head, so that sums of 2**17 and products stay in float32


def grouped_tile(p: jax.Array, blocks: int, tiles: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Returns (row block, vocabulary tile) of program p.

    `group` row blocks walk the vocabulary together. Programs that run at the same time then share
    both the rows and the vocabulary tiles in the L2 cache.
    """
    first = p // (group * tiles) * group
    blocks_in_group = jnp.minimum(blocks - first, group)  # the last group may be smaller
    within = p % (group * tiles)
    return first + within % blocks_in_group, within // blocks_in_group


def triangle_tile(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (row, column) of tile p of a lower triangle, counted row by row.

    Row r starts at tile r(r+1)/2, so r is the floor of the positive root of r(r+1)/2 = p.
    """
    row = ((jnp.sqrt(8.0 * p.astype(jnp.float32) + 1.0) - 1.0) / 2.0).astype(jnp.int32)
    row = jnp.where(row * (row + 1) // 2 > p, row - 1, row)  # float32 may be off by one
    row = jnp.where((row + 1) * (row + 2) // 2 <= p, row + 1, row)
    return row, p - row * (row + 1) // 2

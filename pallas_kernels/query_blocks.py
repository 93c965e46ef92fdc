"""The blocks of queries that one block of keys visits in attention's backward.

The counterpart of key_blocks.py: of the blocks that see a key of the block, those at the diagonal
come first and need a mask. Those behind them need none up to where the documents differ, a query's
window leaves out a key, or the last block has padding.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.key_blocks import Visits, ceil_div, document_ranges
from pallas_kernels.tiles import AttentionTiles


def causal_visits(
    block: Any, tiles: AttentionTiles, T: int, S: int, window: int | None = None
) -> Visits:
    """Returns the visits of a block of keys where all positions are of one document.

    Args:
        window: as in key_blocks.causal_visits.
    """
    start, stop = block * tiles.keys, jnp.minimum((block + 1) * tiles.keys, S)
    first = jnp.maximum(start - (S - T), 0) // tiles.queries
    clear = ceil_div(jnp.maximum(stop - 1 - (S - T), 0), tiles.queries)
    if window is None:
        end = ceil_div(T, tiles.queries)
        return Visits(first, clear, jnp.maximum(T // tiles.queries, clear), end)
    # The first queries whose windows begin after the last and after the first key of the block.
    sees_none = jnp.clip(stop - 1 + window - (S - T), 0, T)
    misses_one = jnp.clip(start + window - (S - T), 0, T)
    end = jnp.maximum(ceil_div(sees_none, tiles.queries), first)
    clear = jnp.minimum(clear, end)
    return Visits(first, clear, jnp.clip(misses_one // tiles.queries, clear, end), end)


def within_documents(visits: Visits, until: Any, end: Any) -> Visits:
    """Returns the visits within document_bounds' two bounds of this block of keys."""
    end = jnp.clip(end, visits.first, visits.end)
    clear = jnp.minimum(visits.clear, end)
    return Visits(visits.first, clear, jnp.clip(until, clear, visits.diagonal), end)


def document_bounds(docs_BT: jax.Array, docs_BS: jax.Array, tiles: AttentionTiles) -> jax.Array:
    """Returns two bounds for each block of keys, int32 [B,M,2], in blocks of queries.

    Up to the first, blocks behind the diagonal have the only document of the keys; where those have
    several, there are none. The second is the end of the blocks with a document between the
    smallest and the largest of the keys. The documents need no order, but only in order do the
    bounds leave out all that they can.
    """
    low_BM1, high_BM1 = (x[:, :, None] for x in document_ranges(docs_BS, tiles.keys))
    low_B1N, high_B1N = (x[:, None, :] for x in document_ranges(docs_BT, tiles.queries))
    M, N = low_BM1.shape[1], low_B1N.shape[2]
    block_M1, block_N = jnp.arange(M, dtype=jnp.int32)[:, None], jnp.arange(N, dtype=jnp.int32)
    clear_M1 = causal_visits(block_M1, tiles, docs_BT.shape[1], docs_BS.shape[1]).clear
    overlaps_BMN = (low_BM1 <= high_B1N) & (low_B1N <= high_BM1)
    # As low <= high, all four are equal here: both blocks have one document, and the same.
    same_BMN = (low_BM1 == high_B1N) & (high_BM1 == low_B1N)
    until_BM = jnp.where(same_BMN | (block_N < clear_M1), N, block_N).min(2)
    end_BM = jnp.where(overlaps_BMN, block_N + 1, 0).max(2)
    return jnp.stack([until_BM, end_BM], 2)

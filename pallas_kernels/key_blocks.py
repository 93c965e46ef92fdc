"""The blocks of keys that one block of queries visits in attention, and which of them need a mask.

Blocks that no query of the block sees are skipped. Blocks that all its queries see entirely need no
mask; they lie one after another, and the masked blocks before and after them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import AmpereAttentionTiles, AttentionTiles


def ceil_div(x: Any, y: Any) -> Any:
    return -(-x // y)


class Visits(NamedTuple):
    """Indices of blocks of keys, int32: first <= clear <= diagonal <= end."""

    first: Any  # the first block that is visited
    clear: Any  # from here to `diagonal`, blocks need no mask
    diagonal: Any
    end: Any  # the number of blocks that the last query sees, documents aside

    @property
    def masked_count(self) -> Any:
        return self.clear - self.first + self.end - self.diagonal

    def masked(self, i: Any) -> Any:
        """Returns the i-th block that needs a mask."""
        j = self.first + i
        return jnp.where(j < self.clear, j, j + self.diagonal - self.clear)

    def loop(self, add_block: Callable[..., Any], carry: Any) -> Any:
        """Returns the carry after add_block(j, carry, masked=...) of every block that is visited.

        Those that need no mask come first.
        """
        unmasked = functools.partial(add_block, masked=False)
        carry = jax.lax.fori_loop(self.clear, self.diagonal, unmasked, carry)
        masked = lambda i, carry: add_block(self.masked(i), carry, masked=True)
        return jax.lax.fori_loop(0, self.masked_count, masked, carry)

    def within_documents(self, first: Any, clear: Any) -> "Visits":
        """Returns the visits within document_bounds' two bounds of this block of queries."""
        first = jnp.minimum(first, self.end)
        diagonal = jnp.maximum(self.diagonal, first)
        return Visits(first, jnp.clip(clear, first, diagonal), diagonal, self.end)


def causal_visits(
    block: Any,
    tiles: AttentionTiles | AmpereAttentionTiles,
    T: int,
    S: int,
    window: int | None = None,
) -> Visits:
    """Returns the visits of a block of queries where all positions are of one document.

    Args:
        window: how many of the keys up to its own position a query sees; None: all.
    """
    start, stop = block * tiles.queries, (block + 1) * tiles.queries
    seen_by_first = jnp.maximum(start + S - T + 1, 0)
    seen_by_last = jnp.clip(stop + S - T, 0, S)
    diagonal, end = seen_by_first // tiles.keys, ceil_div(seen_by_last, tiles.keys)
    if window is None:
        return Visits(0, 0, diagonal, end)
    first = jnp.maximum(start + 1 + S - T - window, 0) // tiles.keys
    # As many keys lie before the window of the last query.
    hidden = jnp.maximum(jnp.minimum(stop, T) + S - T - window, 0)
    return Visits(first, jnp.minimum(ceil_div(hidden, tiles.keys), diagonal), diagonal, end)


def document_ranges(docs_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest and the largest document of each block, two int32 [B,blocks]."""
    B, T = docs_BT.shape
    blocks = ceil_div(T, size)
    docs_BT = jnp.pad(docs_BT, ((0, 0), (0, blocks * size - T)), mode="edge")
    docs = docs_BT.reshape(B, blocks, size)
    return docs.min(2), docs.max(2)


def document_bounds(
    docs_BT: jax.Array,
    docs_BS: jax.Array,
    tiles: AttentionTiles | AmpereAttentionTiles,
    window: int | None = None,
) -> jax.Array:
    """Returns two bounds for each block of queries, int32 [B,N,2], in blocks of keys.

    The first is the first block within the window that has a document between the smallest and the
    largest of the queries. From the second to the diagonal, blocks are within every query's window
    and have the only document of the queries; where those have several, it is the diagonal. The
    documents need no order, but only in order do the bounds leave out all that they can.
    """
    low_BN1, high_BN1 = (x[:, :, None] for x in document_ranges(docs_BT, tiles.queries))
    low_B1M, high_B1M = (x[:, None, :] for x in document_ranges(docs_BS, tiles.keys))
    N, M = low_BN1.shape[1], low_B1M.shape[2]
    block_N1, block_M = jnp.arange(N, dtype=jnp.int32)[:, None], jnp.arange(M, dtype=jnp.int32)
    visits_N1 = causal_visits(block_N1, tiles, docs_BT.shape[1], docs_BS.shape[1], window)
    overlaps_BNM = (low_B1M <= high_BN1) & (low_BN1 <= high_B1M)
    # As low <= high, all four are equal here: both blocks have one document, and the same.
    same_BNM = (low_BN1 == high_B1M) & (high_BN1 == low_B1M)
    first_BN = jnp.where(overlaps_BNM & (block_M >= visits_N1.first), block_M, M).min(2)
    clear_BNM = (same_BNM & (block_M >= visits_N1.clear)) | (block_M >= visits_N1.diagonal)
    clear_BN = jnp.where(clear_BNM, 0, block_M + 1).max(2)
    return jnp.stack([first_BN, clear_BN], 2)

"""The blocks of keys that one block of queries visits in attention, and which of them need a mask.

Blocks that no query of the block sees are skipped. Blocks that all its queries see entirely need no
mask; they lie one after another, and the masked blocks before and after them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import AttentionTiles


def _ceil_div(x, y):
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

    def within_documents(self, first: Any, clear: Any) -> "Visits":
        """Returns the visits within document_bounds' two bounds of this block of queries."""
        first = jnp.minimum(first, self.end)
        diagonal = jnp.maximum(self.diagonal, first)
        return Visits(first, jnp.clip(clear, first, diagonal), diagonal, self.end)


def causal_visits(block: Any, tiles: AttentionTiles, T: int, S: int) -> Visits:
    """Returns the visits of a block of queries where all positions are of one document."""
    seen_by_first = jnp.maximum(block * tiles.queries + S - T + 1, 0)
    seen_by_last = jnp.clip((block + 1) * tiles.queries + S - T, 0, S)
    return Visits(0, 0, seen_by_first // tiles.keys, _ceil_div(seen_by_last, tiles.keys))


def document_bounds(docs_BT: jax.Array, docs_BS: jax.Array, tiles: AttentionTiles) -> jax.Array:
    """Returns two bounds for each block of queries, int32 [B,blocks,2], in blocks of keys.

    The first is the block of the first key whose document lies between the smallest and the largest
    of the queries. From the second on, all keys that the first query sees, documents aside, are of
    the only document of the queries; where they have several, no block is. The documents need no
    order, but only in order do the bounds leave out all that they can.
    """
    (B, T), S = docs_BT.shape, docs_BS.shape[1]
    blocks = _ceil_div(T, tiles.queries)
    padding = (0, 0), (0, blocks * tiles.queries - T)
    docs_BNQ = jnp.pad(docs_BT, padding, mode="edge").reshape(B, blocks, tiles.queries)
    low_BN1, high_BN1 = docs_BNQ.min(2, keepdims=True), docs_BNQ.max(2, keepdims=True)
    keys_S, docs_B1S = jnp.arange(S, dtype=jnp.int32), docs_BS[:, None]
    within_BNS = (low_BN1 <= docs_B1S) & (docs_B1S <= high_BN1)
    first_BN = jnp.where(within_BNS, keys_S, S).min(2)
    first_query_N1 = jnp.arange(blocks, dtype=jnp.int32)[:, None] * tiles.queries
    foreign_BNS = (docs_B1S != low_BN1) & (keys_S <= first_query_N1 + S - T)
    foreign_BNS |= low_BN1 != high_BN1
    clear_BN = jnp.where(foreign_BNS, keys_S + 1, 0).max(2)
    return jnp.stack([first_BN // tiles.keys, _ceil_div(clear_BN, tiles.keys)], 2)

"""The blocks that a program of attention's Mosaic bodies visits, in their order: its steps.

Blocks outside the causal triangle or the window are skipped. The steps that need no mask lie one
after another, and the others before and after them. (The Triton bodies visit the blocks without a
mask first; see key_blocks.py and query_blocks.py.)
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles import MosaicAttentionTiles


class Steps(NamedTuple):
    """Step i visits block first + i. The numbers are traced int32, or int where constant."""

    first: Any
    count: Any
    clear: Any  # from this step to step `masked`, every query sees every key
    masked: Any  # may exceed `count`, and be less than `clear` if all steps need a mask

    def needs_mask(self, step: Any) -> Any:
        """Returns whether a step visits a pair that is hidden, documents aside."""
        after = step >= self.masked
        return after if isinstance(self.clear, int) else (step < self.clear) | after

    def rounded(self, group: int, blocks: int) -> "Steps":
        """Returns the steps of all groups of `group` blocks, of `blocks` in all, with a step."""
        before = lax.rem(self.first, group)
        end = _ceil_div(self.first + self.count, group) * group
        count = jnp.minimum(end, blocks) - self.first + before
        return Steps(self.first - before, count, self.clear + before, self.masked + before)


def _ceil_div(x, y):
    return lax.div(x + y - 1, y)


def key_steps(start: Any, tiles: MosaicAttentionTiles, T: int, S: int, window: int | None) -> Steps:
    """Returns the blocks of keys that the block of queries from `start` sees; at least one."""
    seen_by_last = jnp.clip(start + tiles.queries + S - T, 1, S)
    end = _ceil_div(seen_by_last, tiles.keys)
    diagonal = lax.div(start + S - T + 1, tiles.keys)
    if window is None:
        return Steps(0, end, 0, diagonal)
    first = lax.div(jnp.maximum(start + 1 + S - T - window, 0), tiles.keys)
    # As many keys lie before the window of the last query.
    hidden = jnp.maximum(jnp.minimum(start + tiles.queries, T) + S - T - window, 0)
    return Steps(first, end - first, _ceil_div(hidden, tiles.keys) - first, diagonal - first)


def own_steps(
    steps: Steps,
    start: Any,
    queries: int,
    tiles: MosaicAttentionTiles,
    T: int,
    S: int,
    window: int | None,
) -> Steps:
    """Returns the part of a block's key_steps that the first to the last of some queries needs.

    Args:
        steps: those of the block of queries; step 0 stays the first.
        start, queries: the first of them and their number. If all are padding, one step is left.
    """
    own = key_steps(start, tiles._replace(queries=queries), T, S, window)
    before = own.first - steps.first
    count = jnp.where(start < T, before + own.count, 1)
    return Steps(steps.first, count, own.clear + before, own.masked + before)


def query_steps(
    start: Any, tiles: MosaicAttentionTiles, T: int, S: int, window: int | None
) -> Steps:
    """Returns the blocks of queries that see a key of the block of keys from `start`."""
    first = lax.div(jnp.maximum(start - (S - T), 0), tiles.queries)
    sees_all = jnp.maximum(start + tiles.keys - 1 - (S - T), 0)  # the first such query
    clear = _ceil_div(sees_all, tiles.queries) - first
    count = -(-T // tiles.queries) - first
    masked = count - (T % tiles.queries > 0)  # queries of padding see nothing
    if window is None:
        return Steps(first, count, clear, masked)
    # The first queries whose windows begin after the last and after the first key of the block.
    sees_none = jnp.clip(start + tiles.keys - 1 + window - (S - T), 0, T)
    misses_one = jnp.maximum(start + window - (S - T), 0)
    count = jnp.maximum(_ceil_div(sees_none, tiles.queries) - first, 0)
    masked = jnp.minimum(masked, lax.div(misses_one, tiles.queries) - first)
    return Steps(first, count, clear, masked)


class QueryBlock(NamedTuple):
    """The position of a program's block of queries, in traced numbers."""

    group: Any  # the index of this warp group
    head: Any
    key_head: Any
    batch: Any
    start: Any  # its first query
    steps: Steps  # the blocks of keys that it sees


def find_query_block(
    T: int, S: int, tiles: MosaicAttentionTiles, ratio: int, window: int | None
) -> QueryBlock:
    """Returns the block of this program; `ratio` query heads share a key head."""
    group, head, batch = (lax.axis_index(name) for name in ("group", "head", "batch"))
    # The longest blocks first, so that no long one starts last.
    block = lax.axis_size("block") - 1 - lax.axis_index("block")
    start = block * tiles.queries
    steps = key_steps(start, tiles, T, S, window)
    return QueryBlock(group, head, lax.div(head, ratio), batch, start, steps)

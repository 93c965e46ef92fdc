"""Attention's Mosaic bodies visit each block that holds a visible pair once, and no others."""

import numpy as np
import pytest

from pallas_kernels.attention_steps import key_steps, query_steps
from pallas_kernels.tiles import MosaicAttentionTiles
from tests.test_kernels_key_blocks import SIZES, visible_pairs

TILES = MosaicAttentionTiles(32, 16, 2), MosaicAttentionTiles(16, 32, 2)


def steps_of_blocks(steps_of, blocks, size, *sizes):
    """Yields (block, the blocks that it visits, those of them that need no mask)."""
    starts = np.arange(blocks, dtype=np.int32) * size
    steps = [np.broadcast_to(np.asarray(x), blocks) for x in steps_of(starts, *sizes)]
    for block, (first, count, clear, masked) in enumerate(zip(*steps, strict=True)):
        unmasked = range(max(clear, 0), min(masked, count))
        yield block, {*range(first, first + count)}, {first + i for i in unmasked}


@pytest.mark.parametrize("window", [None, 1, 40, 64])
@pytest.mark.parametrize("size", SIZES)
def test_each_visible_pair_is_in_a_step_and_masks_are_left_out_only_where_all_is_visible(
    size, window
):
    """A block of queries that sees nothing has one step, since step 0 is not part of a loop."""
    T, S = SIZES[size]
    (seen,) = visible_pairs(None, T, S, window)
    for tiles in TILES:
        blocks_T, blocks_S = -(-T // tiles.queries), -(-S // tiles.keys)
        padded = np.zeros((blocks_T * tiles.queries, blocks_S * tiles.keys), bool)
        padded[:T, :S] = seen
        pairs = padded.reshape(blocks_T, tiles.queries, blocks_S, tiles.keys)
        some, rows = pairs.any((1, 3)), padded[:T].reshape(T, blocks_S, tiles.keys).all(2)
        for block, visited, unmasked in steps_of_blocks(
            key_steps, blocks_T, tiles.queries, tiles, T, S, window
        ):
            entire = rows[block * tiles.queries :][: tiles.queries].all(0)
            assert visited == {*np.flatnonzero(some[block])} or (
                visited == {0} and not some[block].any()
            )
            assert unmasked == {*np.flatnonzero(entire)}
        for block, visited, unmasked in steps_of_blocks(
            query_steps, blocks_S, tiles.keys, tiles, T, S, window
        ):
            # Keys of padding are not stored, so that they need no mask.
            columns = pairs[:, :, block, : S - block * tiles.keys]
            assert visited == {*np.flatnonzero(some[:, block])}
            assert unmasked <= {*np.flatnonzero(columns.all((1, 2)))}

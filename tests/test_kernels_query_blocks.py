"""Attention's backward visits each block of queries that sees its keys once, and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import query_blocks
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.tiles import AttentionTiles, FlashAttentionTiles
from tests.test_kernels_key_blocks import SIZES, TILES, check_visits, documents, visible_pairs


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def visits_of_blocks(docs, T, S, tiles, window):
    """Returns the visits of all blocks of keys, [B,M], and their masked blocks, [N,B,M]."""
    blocks = jnp.arange(-(-S // tiles.keys))[None]
    visits = query_blocks.causal_visits(blocks, tiles, T, S, window)
    if docs is not None:
        docs_BT, docs_BS = docs
        bounds = query_blocks.document_bounds(docs_BT, docs_BS, tiles)
        visits = query_blocks.within_documents(visits, bounds[..., 0], bounds[..., 1])
    turns = jnp.arange(-(-T // tiles.queries))[:, None, None]
    return visits, visits.masked_count, visits.masked(turns)


def visited_blocks(docs, T, S, tiles, window):
    """Yields (sequence, block of keys, blocks of queries without masks, those with masks)."""
    visits, counts, masked = jax.tree.map(np.asarray, visits_of_blocks(docs, T, S, tiles, window))
    for at in np.ndindex(counts.shape):
        turns = masked[(slice(0, counts[at]), *at)]
        yield (*at, list(range(visits.clear[at], visits.diagonal[at])), turns.tolist())


@pytest.mark.parametrize("window", [None, 1, 40, 64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["one document", "ordered", "unordered"])
def test_every_query_that_sees_a_key_is_visited_once_and_masked_only_if_needed(size, kind, window):
    """Padding of the queries needs a mask, padding of the keys none."""
    T, S = SIZES[size]
    docs = None if kind == "one document" else documents(kind, T, S)
    seen = visible_pairs(docs, T, S, window)
    for sizes in (TILES, AttentionTiles(16, 32, 4, 1)):
        for sequence, block, unmasked, masked in visited_blocks(docs, T, S, sizes, window):
            pairs = seen[sequence, :, block * sizes.keys :][:, : sizes.keys]
            tiles = [pairs[at : at + sizes.queries] for at in range(0, T, sizes.queries)]
            needed = {i for i, tile in enumerate(tiles) if tile.any()}
            entire = {i for i in needed if tiles[i].all() and len(tiles[i]) == sizes.queries}
            check_visits(unmasked, masked, needed, entire, is_exact=kind != "unordered")


def test_the_backward_does_not_read_blocks_of_other_documents():
    """A NaN that is read reaches every sum of its tile, as it is multiplied by zero."""
    blocks = FlashAttentionTiles(TILES, TILES, TILES)
    q, k, v, do = jax.random.normal(jax.random.key(0), (4, 1, 128, 1, 16), jnp.float32)
    docs = jnp.arange(128, dtype=jnp.int32)[None] // 64

    @jax.jit
    def gradients(q, k, v, do):
        attend = lambda q, k, v: flash_attention(q, k, v, docs, docs, blocks, True)
        return jax.vjp(attend, q, k, v)[1](do)

    finite = lambda x: np.isfinite(x[0]).all((1, 2))
    dq, dk, dv = map(finite, gradients(q, k, v, do.at[0, 100].set(jnp.nan)))
    assert dq[:64].all() and dk[:64].all() and dv[:64].all()
    assert not dv[64:101].any()
    dq, dk, dv = map(finite, gradients(q, k.at[0, 40].set(jnp.nan), v, do))
    assert dq[64:].all() and dk[64:].all() and dv[64:].all()
    assert not dq[40:64].any()

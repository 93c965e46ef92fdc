"""Attention's forward visits each block of keys that its queries see once, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import key_blocks
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.tiles import AttentionTiles, FlashAttentionTiles

TILES = AttentionTiles(32, 16, 4, 1)
SIZES = {  # T, S
    "square": (128, 128),
    "ragged": (107, 107),
    "fewer queries than keys": (70, 133),
    "more queries than keys": (133, 70),
}


def documents(kind, T, S):
    """Returns the documents of the queries and of the keys, each of three sequences."""
    rng = np.random.default_rng(0)
    starts = rng.random((3, max(T, S))) < np.array([[0.1], [0.02], [0.0]])
    docs = np.cumsum(starts, 1, dtype=np.int32)
    if kind == "unordered":
        docs = rng.permuted(docs // 3, axis=1)
    return jnp.asarray(docs[:, -T:]), jnp.asarray(docs[:, -S:])


def visible_pairs(docs, T, S):
    """Returns which query sees which key, [B,T,S]."""
    causal = np.arange(S) <= np.arange(T)[:, None] + S - T
    if docs is None:
        return causal[None]
    return causal & np.asarray(docs[0][:, :, None] == docs[1][:, None, :])


def visited(visits):
    """Returns the blocks of keys that are visited (without a mask, with a mask)."""
    masked = [int(visits.masked(i)) for i in range(int(visits.masked_count))]
    return list(range(int(visits.clear), int(visits.diagonal))), masked


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["one document", "ordered", "unordered"])
def test_every_visible_key_is_visited_once_and_masks_are_left_out_only_where_all_is_visible(
    size, kind
):
    """With documents in order, blocks are visited only if needed, and masked only if needed."""
    T, S = SIZES[size]
    docs = None if kind == "one document" else documents(kind, T, S)
    seen = visible_pairs(docs, T, S)
    bounds = None if docs is None else np.asarray(key_blocks.document_bounds(*docs, TILES))
    for batch, pairs_TS in enumerate(seen):
        for block in range(-(-T // TILES.queries)):
            visits = key_blocks.causal_visits(jnp.int32(block), TILES, T, S)
            if bounds is not None:
                visits = visits.within_documents(*bounds[batch, block])
            pairs = pairs_TS[block * TILES.queries :][: TILES.queries]
            tiles = [pairs[:, at : at + TILES.keys] for at in range(0, S, TILES.keys)]
            needed = {j for j, tile in enumerate(tiles) if tile.any()}
            entire = {j for j in needed if tiles[j].all() and tiles[j].shape[1] == TILES.keys}
            unmasked, masked = visited(visits)
            assert len({*unmasked, *masked}) == len(unmasked) + len(masked)
            assert needed <= {*unmasked, *masked}
            assert {*unmasked} <= entire
            if kind != "unordered":
                assert {*unmasked, *masked} == needed and {*unmasked} == entire


def test_four_documents_of_equal_length_need_less_than_a_third_of_the_visits():
    T, tiles = 2_048, AttentionTiles(128, 64, 8, 2)
    docs = jnp.arange(T, dtype=jnp.int32)[None] // 512
    bounds = np.asarray(key_blocks.document_bounds(docs, docs, tiles))[0]
    counts = []
    for block in range(T // tiles.queries):
        causal = key_blocks.causal_visits(jnp.int32(block), tiles, T, T)
        within = causal.within_documents(*bounds[block])
        counts.append([sum(map(len, visited(visits))) for visits in (causal, within)])
    assert np.sum(counts, 0).tolist() == [272, 80]


def test_blocks_of_other_documents_are_not_read():
    """A NaN among values that are read reaches every query, as it is multiplied by zero."""
    blocks = FlashAttentionTiles(TILES, TILES, TILES)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 1, 16), jnp.float32)
    docs = jnp.arange(128, dtype=jnp.int32)[None] // 64
    o = flash_attention(q, k, v.at[0, 40].set(jnp.nan), docs, docs, blocks, True)
    assert jnp.isfinite(o[:, 64:]).all() and jnp.isnan(o[:, 40:64]).all()

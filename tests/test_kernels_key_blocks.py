"""Attention's forward visits each block of keys that its queries see once, and no others."""

import functools

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
    starts[2, 50] = True  # within a block of keys that some block of queries ends in
    docs = np.cumsum(starts, 1, dtype=np.int32)
    if kind == "unordered":
        docs = rng.permuted(docs // 3, axis=1)
    return jnp.asarray(docs[:, -T:]), jnp.asarray(docs[:, -S:])


def visible_pairs(docs, T, S, window=None):
    """Returns which query sees which key, [B,T,S]."""
    last = np.arange(T)[:, None] + S - T
    causal = (np.arange(S) <= last) & (np.arange(S) > last - (window or S))
    if docs is None:
        return causal[None]
    return causal & np.asarray(docs[0][:, :, None] == docs[1][:, None, :])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def visits_of_blocks(docs, T, S, tiles, window):
    """Returns clear, diagonal and the number of masked blocks, [B,N], and those blocks, [M,B,N]."""
    blocks = jnp.arange(-(-T // tiles.queries))[None]
    visits = key_blocks.causal_visits(blocks, tiles, T, S, window)
    if docs is not None:
        docs_BT, docs_BS = docs
        bounds = key_blocks.document_bounds(docs_BT, docs_BS, tiles, window)
        visits = visits.within_documents(bounds[..., 0], bounds[..., 1])
    turns = jnp.arange(-(-S // tiles.keys))[:, None, None]
    clear = visits.clear + 0 * visits.diagonal  # an array, also without documents
    return clear, visits.diagonal, visits.masked_count, visits.masked(turns)


def visited_blocks(docs, T, S, tiles, window=None):
    """Yields (sequence, block of queries, blocks of keys without masks, those with masks)."""
    clear, diagonal, count, masked = map(np.asarray, visits_of_blocks(docs, T, S, tiles, window))
    for at in np.ndindex(clear.shape):
        turns = masked[(slice(0, count[at]), *at)]
        yield (*at, list(range(clear[at], diagonal[at])), turns.tolist())


def check_visits(unmasked, masked, needed, entire, is_exact):
    """Checks that each needed block is visited once; where bounds are exact, that no other is."""
    assert len({*unmasked, *masked}) == len(unmasked) + len(masked)
    assert needed <= {*unmasked, *masked}
    assert {*unmasked} <= entire
    if is_exact:
        assert {*unmasked, *masked} == needed and {*unmasked} == entire


@pytest.mark.parametrize("window", [None, 1, 40, 64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["one document", "ordered", "unordered"])
def test_every_visible_key_is_visited_once_and_masks_are_left_out_only_where_all_is_visible(
    size, kind, window
):
    """With documents in order, blocks are visited only if needed, and masked only if needed."""
    T, S = SIZES[size]
    docs = None if kind == "one document" else documents(kind, T, S)
    seen = visible_pairs(docs, T, S, window)
    for sizes in (TILES, AttentionTiles(16, 32, 4, 1)):
        for sequence, block, unmasked, masked in visited_blocks(docs, T, S, sizes, window):
            pairs = seen[sequence, block * sizes.queries :][: sizes.queries]
            tiles = [pairs[:, at : at + sizes.keys] for at in range(0, S, sizes.keys)]
            needed = {j for j, tile in enumerate(tiles) if tile.any()}
            entire = {j for j in needed if tiles[j].all() and tiles[j].shape[1] == sizes.keys}
            check_visits(unmasked, masked, needed, entire, is_exact=kind != "unordered")


def test_four_documents_of_equal_length_need_less_than_a_third_of_the_visits():
    T, tiles = 2_048, AttentionTiles(128, 64, 8, 2)
    four = jnp.arange(T, dtype=jnp.int32)[None] // 512
    count = lambda docs: sum(len(a) + len(b) for *_, a, b in visited_blocks(docs, T, T, tiles))
    assert (count(None), count((four, four))) == (272, 80)


def test_blocks_of_other_documents_are_not_read():
    """A NaN among values that are read reaches every query, as it is multiplied by zero."""
    blocks = FlashAttentionTiles(TILES, TILES, TILES)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 1, 16), jnp.float32)
    docs = jnp.arange(128, dtype=jnp.int32)[None] // 64
    o = flash_attention(q, k, v.at[0, 40].set(jnp.nan), docs, docs, blocks, True)
    assert jnp.isfinite(o[:, 64:]).all() and jnp.isnan(o[:, 40:64]).all()

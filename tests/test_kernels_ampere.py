"""Compares the Mosaic bodies for Ampere with float64 references, interpreted on CPU.

The interpreter implements neither mma nor cp.async; pallas_kernels/ampere.py says what it runs in
their place. JAX_PLATFORMS=cuda python -m pytest -m gpu runs them compiled, on an A40.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ampere, flash_attention_ampere, mosaic
from pallas_kernels.flash_attention import flash_attention_reference
from pallas_kernels.key_blocks import Visits
from pallas_kernels.symmetric import symmetric, symmetric_reference
from pallas_kernels.tile_order import EMPTY_ROW_LSE
from pallas_kernels.tiles import AmpereAttentionTiles, AmpereProductTiles

ON_GPU = jax.default_backend() == "gpu"
on_ampere = ON_GPU and jax.devices()[0].compute_capability.startswith("8.")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON),
    pytest.mark.skipif(ON_GPU and not on_ampere, reason="these bodies are for sm_80 to sm_89"),
]
HALF = jnp.bfloat16


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, HALF)


def exact(function, *arrays):
    """Evaluates a function in float64, at the same numbers."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x, jnp.float64) if x.dtype == HALF else jnp.asarray(x)
        return jax.tree.map(np.asarray, function(*map(wide, arrays)))


def distance(got, want):
    """Returns the relative Frobenius distance."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# Tiles of one square and of four, the second of which do not divide the 192 rows.
SQUARES = [
    (AmpereProductTiles(64, 32, 3), (1, 128, 128)),
    (AmpereProductTiles(128, 64, 2), (1, 192, 128)),
]


@pytest.mark.parametrize("tiles, shape", SQUARES)
def test_symmetric_adds_a_scaled_matrix_and_equals_its_own_transpose(tiles, shape):
    """Computes b A + c A^2 of a Gram matrix, with traced b and c."""
    x = draw(0, *shape)
    gram = symmetric(x, tiles=tiles, interpret=not ON_GPU)
    assert gram.dtype == HALF and jnp.array_equal(gram, gram.mT)
    assert distance(gram, exact(symmetric_reference, x)) < 3e-3
    if shape[1] % 128:
        return  # one case of the sum is enough for the time that it takes
    combine = jax.jit(lambda x, a, b: symmetric(x, x, x, (a, b), tiles=tiles, interpret=not ON_GPU))
    got = combine(gram, 2.03, -4.77)
    assert jnp.array_equal(got, got.mT)
    want = exact(lambda x: symmetric_reference(x, x, x, (2.03, -4.77)), gram)
    assert distance(got, want) < 3e-3


def test_a_product_that_is_not_symmetric_mirrors_its_lower_triangle():
    x, y = draw(0, 1, 192, 64), draw(1, 1, 192, 64)
    got = symmetric(x, y, tiles=AmpereProductTiles(128, 32, 3), interpret=not ON_GPU)
    assert jnp.array_equal(got, got.mT)
    assert distance(jnp.tril(got), np.tril(exact(symmetric_reference, x, y))) < 3e-3


ATTENTION = {  # B, T, S, H, G, K, window, tiles
    "documents, window, wide heads": (1, 72, 200, 1, 1, 128, 90, (64, 32, 3)),
    "documents, queries with nothing to see, shared heads": (
        *(1, 136, 136, 2, 1, 64, None),
        (64, 64, 4),
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_the_reference(name):
    """It has at most 1.3 times the error of plain attention in bfloat16."""
    B, T, S, H, G, K, window, tiles = ATTENTION[name]
    q, k, v = draw(0, B, T, H, K), draw(1, B, S, G, K), draw(2, B, S, G, K)
    docs = ()
    if "documents" in name:
        docs = (jnp.arange(S, dtype=jnp.int32)[None] // 101,) * 2
        docs = docs[0][:, S - T :], docs[1]
    if "nothing" in name:
        docs = docs[0].at[:, :64].set(S), docs[1]
    tiles = AmpereAttentionTiles(*tiles)
    o, lse = flash_attention_ampere.forward(q, k, v, docs, tiles, not ON_GPU, window)
    reference = lambda q, k, v: flash_attention_reference(q, k, v, *(docs or (None, None)), window)
    want = exact(reference, q, k, v)
    assert distance(o, want) < min(5e-3, 1.3 * distance(reference(q, k, v), want))
    k = jnp.repeat(k, H // G, 2)
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k, preferred_element_type=jnp.float32)
    last = np.arange(T)[:, None] + S - T
    visible = (np.arange(S) <= last) & (np.arange(S) > last - (window or S))
    if docs:
        same = np.asarray(docs[0])[:, :, None] == np.asarray(docs[1])[:, None, :]
        visible = visible & same[:, None]
    scores = np.where(visible, np.asarray(scores, np.float64) * K**-0.5, -np.inf)
    with np.errstate(divide="ignore"):
        wanted = np.log2(np.exp(scores).sum(-1))
    seen = np.asarray(np.broadcast_to(visible, scores.shape).any(-1))
    np.testing.assert_allclose(np.asarray(lse)[seen], wanted[seen], atol=1e-4)
    assert (np.asarray(lse)[~seen] == EMPTY_ROW_LSE).all()
    if "nothing" in name:
        assert not o[:, : T - S].any() and not seen[..., : T - S].any()


def elements(layout, shape):
    """Returns which elements of an array each thread has: [warps,lanes,registers,vector]."""
    x = np.arange(math.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        outer = x.ndim - len(tile)
        split = zip(x.shape[outer:], tile, strict=True)
        x = x.reshape(*x.shape[:outer], *(n for size, part in split for n in (size // part, part)))
        x = x.transpose(*range(outer), *range(outer, x.ndim, 2), *range(outer + 1, x.ndim, 2))
    threads = [
        [dim % x.ndim for dim in dims if isinstance(dim, int)]
        for dims in (layout.warp_dims, layout.lane_dims)
    ]
    vector = layout.vector_dim % x.ndim
    registers = [dim for dim in range(x.ndim) if dim not in (*threads[0], *threads[1], vector)]
    warps, lanes = (math.prod(x.shape[dim] for dim in dims) for dims in threads)
    x = x.transpose(*threads[0], *threads[1], *registers, vector)
    return x.reshape(warps, lanes, -1, x.shape[-1])


def test_probabilities_keep_their_registers_as_an_operand():
    """The interpreter ignores layouts, so it would not show a wrong order in as_operand."""
    layouts = ampere.Layouts(HALF, flash_attention_ampere.WARPS_ALONG_ROWS)
    as_sum, as_operand = (elements(x.to_mgpu(), (64, 32)) for x in (layouts.sum, layouts.x))
    np.testing.assert_array_equal(as_sum, as_operand)
    assert np.array_equal(np.sort(as_sum, None), np.arange(64 * 32))


def test_blocks_of_keys_are_visited_once_each_and_those_without_a_mask_first():
    order = flash_attention_ampere._Order(Visits(2, 4, 7, 9))
    blocks = [int(order.block(step)) for step in range(int(order.count))]
    assert blocks == [4, 5, 6, 7, 8, 2, 3]
    assert blocks[: int(order.unmasked)] == [4, 5, 6]


@pytest.mark.parametrize(
    "shape, dtype, tiles, message",
    [
        ((1, 128, 64), jnp.float32, (128, 32, 3), r"got x=float32\[1, 128, 64\]"),
        ((1, 128, 96), HALF, (128, 32, 3), r"multiple of 64; got x=bfloat16\[1, 128, 96\]"),
        ((1, 136, 64), HALF, (128, 32, 3), r"writes rows of .* got bfloat16\[1, 136, 136\]"),
        ((1, 64, 64), HALF, (128, 32, 3), r"tiles.size must be at most .*M=64; got 128"),
        ((1, 128, 64), HALF, (96, 32, 3), r"tiles.size must be a multiple of 64; got 96"),
        ((1, 128, 64), HALF, (128, 128, 3), r"tiles.depth must be 32 or 64; got 128"),
        ((1, 128, 64), HALF, (128, 32, 1), r"tiles.stages must be at least 2; got 1"),
    ],
)
def test_arrays_and_tiles_that_the_body_cannot_take_are_an_error(shape, dtype, tiles, message):
    with pytest.raises(ValueError, match=message):
        symmetric(jnp.ones(shape, dtype), tiles=AmpereProductTiles(*tiles), interpret=True)

"""Compares the Mosaic bodies with float64 references, interpreted on CPU thread by thread.

JAX_PLATFORMS=cuda python -m pytest -m gpu runs them compiled, on an H100. test_kernels_audit.py
checks without a GPU that they compile.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
from pallas_kernels.head_scores import (
    REFERENCE_SHIFT,
    head_scores,
    head_scores_reference,
    target_logits,
)
from pallas_kernels.symmetric import symmetric, symmetric_reference
from pallas_kernels.tiles import (
    AttentionTiles,
    FlashAttentionTiles,
    MosaicAttentionTiles,
    MosaicProductTiles,
)

ON_GPU = jax.default_backend() == "gpu"
on_hopper = ON_GPU and jax.devices()[0].compute_capability == "9.0"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON),
    pytest.mark.skipif(ON_GPU and not on_hopper, reason="Mosaic bodies are for sm_90"),
]
HALF = jnp.bfloat16


@pytest.fixture(autouse=True)
def no_race(capfd):
    """Fails if the interpreter reports a write to memory that may still be in use."""
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.fixture
def offsets_dropped(monkeypatch):
    """Lets interpreted stores drop the offset of columns that they fill, as Mosaic GPU does.

    TMA then stores at column 0 what lies past the last column, where the interpreter skips it.
    """
    if ON_GPU:
        return
    store = mosaic.plgpu.copy_smem_to_gmem

    def store_without_offset(source, target):
        *indices, columns = target.transforms[-1].indices
        strip = mosaic.row_multiple(source.dtype)
        if columns.size == target.ref.shape[-1] == strip:
            target = target.ref.at[*indices, pl.ds(0, strip)]
        store(source, target)

    monkeypatch.setattr(mosaic.plgpu, "copy_smem_to_gmem", store_without_offset)


def exact(function, *arrays):
    """Evaluates a function in float64, at the same numbers."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x, jnp.float64) if x.dtype == HALF else jnp.asarray(x)
        return jax.tree.map(np.asarray, function(*map(wide, arrays)))


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, HALF)


def distance(got, want):
    """Returns the relative Frobenius distance."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# Tiles with half as many columns as rows, and as many. The shapes are not multiples of the tiles.
SQUARES = [
    (MosaicProductTiles(128, 64, 64, 2), (1, 192, 320)),
    (MosaicProductTiles(128, 128, 64, 3), (2, 192, 64)),
]


@pytest.mark.parametrize("tiles, shape", SQUARES)
def test_symmetric_equals_the_product_and_its_own_transpose(tiles, shape):
    x = draw(0, *shape)
    got = symmetric(x, tiles=tiles, interpret=not ON_GPU)
    assert got.dtype == HALF
    assert jnp.array_equal(got, got.mT)
    assert distance(got, exact(symmetric_reference, x)) < 3e-3


@pytest.mark.usefixtures("offsets_dropped")
@pytest.mark.parametrize("tiles", [tiles for tiles, _ in SQUARES])
def test_symmetric_is_right_for_matrices_of_64_rows(tiles):
    x, c = draw(0, 2, 64, 64), draw(1, 2, 64, 64)
    c, interpret = c + c.mT, not ON_GPU
    # Not the compiled function's own cache, which the other tests share.
    got = symmetric.__wrapped__(x, x, c, (1.5, -2.0), tiles=tiles, interpret=interpret)
    assert jnp.array_equal(got, got.mT)
    want = exact(lambda x, c: symmetric_reference(x, x, c, (1.5, -2.0)), x, c)
    assert distance(got, want) < 3e-3


@pytest.mark.parametrize("tiles, shape", SQUARES)
def test_symmetric_adds_a_scaled_matrix_to_a_scaled_product(tiles, shape):
    """Computes b A + c A^2 of a Gram matrix, with traced b and c."""
    x = draw(0, *shape).astype(jnp.float32)
    gram = (jnp.einsum("xmk,xjk->xmj", x, x) / shape[2]).astype(HALF)
    combine = jax.jit(lambda x, a, b: symmetric(x, x, x, (a, b), tiles=tiles, interpret=not ON_GPU))
    got = combine(gram, 2.03, -4.77)
    assert jnp.array_equal(got, got.mT)
    want = exact(lambda x: symmetric_reference(x, x, x, (2.03, -4.77)), gram)
    assert distance(got, want) < 3e-3


def test_a_product_that_is_not_symmetric_mirrors_its_lower_triangle():
    x, y = draw(0, 1, 192, 64), draw(1, 1, 192, 64)
    got = symmetric(x, y, tiles=SQUARES[0][0], interpret=not ON_GPU)
    assert jnp.array_equal(got, got.mT)
    assert distance(jnp.tril(got), np.tril(exact(symmetric_reference, x, y))) < 3e-3


@pytest.mark.parametrize(
    "x, message",
    [
        (jnp.ones((1, 128, 64)), r"got x=float32\[1, 128, 64\]"),
        (jnp.ones((1, 128, 136), HALF), r"multiple of 64; got x=bfloat16\[1, 128, 136\]"),
        (jnp.ones((1, 156, 64), HALF), r"writes rows of .* got bfloat16\[1, 156, 156\]"),
    ],
)
def test_arrays_that_the_memory_accelerator_cannot_copy_are_an_error(x, message):
    with pytest.raises(ValueError, match=message):
        symmetric(x, tiles=SQUARES[0][0], interpret=True)


def test_more_than_8_rows_that_are_no_multiple_of_8_are_an_error_unless_they_can_be_padded():
    tiles, q = MosaicAttentionTiles(128, 64, 2), jnp.ones((1, 12, 1, 64), HALF)
    blocks = FlashAttentionTiles(tiles, MosaicAttentionTiles(64, 128, 2), tiles)
    with pytest.raises(ValueError, match=r"a multiple of them; got T=12\."):
        flash_attention(q, q, q, None, None, blocks, True)
    w, reference_N = jnp.ones((36, 64), HALF), jnp.zeros(8)
    with pytest.raises(ValueError, match=r"a multiple of them; got V=36\."):
        head_scores(q[0, :8, 0], w, reference_N, SQUARES[0][0], keep="", interpret=True)


def test_head_scores_equal_the_reference():
    """Neither N nor V is a multiple of its tile."""
    tiles, (N, D, V) = MosaicProductTiles(128, 128, 64, 2, group=1), (141, 64, 320)
    h, w = draw(0, N, D), draw(1, V, D) / 4
    targets = jax.random.randint(jax.random.key(2), (N,), 0, V)
    for softcap, keep in ((15.0, "logits"), (0.0, "exponentials"), (0.0, "")):
        reference_N = target_logits(h, w, targets, softcap) + REFERENCE_SHIFT
        got = head_scores(h, w, reference_N, tiles, softcap, keep, not ON_GPU)
        want = exact(lambda *x: head_scores_reference(*x, softcap, keep), h, w, reference_N)  # noqa: B023
        assert distance(jnp.log(got.total_N), np.log(want.total_N)) < 1e-6
        if keep:
            assert distance(got.kept_NV, want.kept_NV) < (2e-6 if softcap else 3e-3)
        else:
            assert got.kept_NV is None


@pytest.mark.usefixtures("offsets_dropped")
@pytest.mark.parametrize("keep, V", [("exponentials", 64), ("logits", 32)])
def test_what_head_scores_keep_is_right_where_a_row_is_one_strip_of_a_tile(keep, V):
    tiles, reference_N = MosaicProductTiles(128, 128, 64, 2), jnp.zeros(8)
    h, w = draw(0, 8, 64), draw(1, V, 64) / 4
    got = head_scores.__wrapped__(h, w, reference_N, tiles, keep=keep, interpret=not ON_GPU)
    want = exact(lambda *x: head_scores_reference(*x, keep=keep), h, w, reference_N)
    assert distance(got.kept_NV, want.kept_NV) < 3e-3


def test_logits_that_the_memory_accelerator_cannot_write_are_an_error():
    h, w, reference_N = jnp.ones((8, 64), HALF), jnp.ones((1_009, 64), HALF), jnp.zeros(8)
    with pytest.raises(ValueError, match=r"writes rows of .* got float32\[8, 1009\]"):
        head_scores(h, w, reference_N, SQUARES[0][0], interpret=True)


KEYLESS = 64  # queries with nothing to see, as their document has no key
ATTENTION = {  # B, T, S, H, G, K, keys per step
    "more rows than whole blocks, shared heads": (1, 136, 136, 2, 1, 64, 64),
    "documents, window, shared heads, fewer queries than keys": (1, 72, 200, 2, 1, 64, 64),
    "documents, queries with nothing to see, wide heads": (1, 136, 136, 1, 1, 128, 128),
    "window that some blocks of keys are before": (1, 72, 344, 1, 1, 64, 64),
    "Triton's body of dk and dv": (1, 64, 64, 1, 1, 64, 64),  # bodies may be mixed
    "stored gradients, shared heads": (1, 136, 200, 2, 1, 64, 64),
    "stored gradients, documents, window, queries with nothing to see": (1, 200, 200, 1, 1, 64, 64),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_flash_attention_and_its_gradients_equal_the_reference(name):
    """Each result has at most 1.3 times the error of plain attention in bfloat16."""
    B, T, S, H, G, K, keys = ATTENTION[name]
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)
    q, k, v, do = (draw(seed, *shape) for seed, shape in enumerate(shapes))
    docs, window = (None, None), {200: 70, 344: 200}[S] if "window" in name else None
    if "documents" in name:
        starts = jax.random.bernoulli(jax.random.key(9), 0.03, (B, S))
        docs = (jnp.cumsum(starts, 1, dtype=jnp.int32),) * 2
        docs = docs[0][:, S - T :], docs[1]
    if "nothing" in name:
        docs = docs[0].at[:, :KEYLESS].set(S), docs[1]
    dkv = AttentionTiles(64, 64, 8, 2) if "Triton" in name else MosaicAttentionTiles(64, 128, 2)
    forward, dq = MosaicAttentionTiles(128, keys, 2), MosaicAttentionTiles(128, 64, 2)
    if "stored" in name:  # and the other variants
        forward = MosaicAttentionTiles(192, keys, 2, variant="folded", groups=3)
        dkv, dq = dkv._replace(variant="turns"), dq._replace(queries=256, variant="stored")
    blocks = FlashAttentionTiles(forward, dkv, dq)

    def both_ways(attention):
        def results(q, k, v, do):
            o, pullback = jax.vjp(attention, q, k, v)
            return o, *pullback(do)

        return results

    got = both_ways(lambda *x: flash_attention(*x, *docs, blocks, not ON_GPU, window))(q, k, v, do)
    plain = both_ways(lambda *x: flash_attention_reference(*x, *docs, window))
    for x, x_plain, x_exact in zip(got, plain(q, k, v, do), exact(plain, q, k, v, do), strict=True):
        assert distance(x, x_exact) < min(5e-3, 1.3 * distance(x_plain, x_exact))
    if "nothing" in name:
        assert not got[0][:, :KEYLESS].any() and not got[1][:, :KEYLESS].any()

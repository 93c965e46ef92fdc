"""Kernels, interpreted on CPU, against float64; that they compile is test_kernels_audit.py's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
from pallas_kernels.symmetric import TILE, _place, symmetric, symmetric_reference
from pallas_kernels.tuned import Blocks, Tiles

HALF, FULL = jnp.bfloat16, jnp.float32


@pytest.fixture(autouse=True)
def wide():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def draw(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def off(got, want):
    """Relative Frobenius distance."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def exact(*arrays):
    return [jnp.asarray(x, jnp.float64) for x in arrays]


@pytest.mark.parametrize("shape", [(3, 37, 192), (600, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(FULL, 2e-6), (HALF, 3e-3)])
def test_add_rms_norm_and_its_gradients_equal_the_reference(shape, dtype, tolerance):
    h, y, ds, dn = (draw(seed, shape, dtype) for seed in range(4))
    gain = 1 + 0.1 * draw(4, shape[-1:], FULL)
    run = lambda h, y, gain: add_rms_norm(h, y, gain, 1e-6, True)
    (s, n), pullback = jax.vjp(run, h, y, gain)
    assert s.dtype == n.dtype == dtype
    assert jnp.array_equal(s, h + y)
    dh, dy, dgain = pullback((ds, dn))
    assert jnp.array_equal(dh, dy)

    law = lambda s, gain: add_rms_norm_reference(s, jnp.zeros_like(s), gain, 1e-6)
    (_, n_exact), pullback_exact = jax.vjp(law, *exact(s, gain))  # of the sum as it was rounded
    dh_exact, dgain_exact = pullback_exact(tuple(exact(ds, dn)))
    assert off(n, n_exact) < tolerance
    assert off(dh, dh_exact) < tolerance
    assert off(dgain, dgain_exact) < 1e-5


def test_the_gains_gradient_has_the_same_bits_every_time():
    h, y, ds, dn = (draw(seed, (600, 64), HALF) for seed in range(4))
    grad = lambda: jax.vjp(lambda g: add_rms_norm(h, y, g, 1e-6, True), jnp.ones(64, FULL))[1](
        (ds, dn)
    )[0]
    assert jnp.array_equal(grad(), grad())


@pytest.mark.parametrize("shape", [(2, 128, 64), (1, 300, 40)])
@pytest.mark.parametrize("dtype, tolerance", [(FULL, 2e-6), (HALF, 3e-3)])
def test_symmetric_equals_the_product_and_its_own_transpose(shape, dtype, tolerance):
    x = draw(0, shape, dtype)
    got = symmetric(x, interpret=True)
    assert got.dtype == dtype
    assert jnp.array_equal(got, got.mT)
    assert off(got, symmetric_reference(*exact(x))) < tolerance


def test_tiles_of_a_triangle_are_counted_once_each_to_any_size():
    for tiles in (1, 7, 300):
        count = tiles * (tiles + 1) // 2
        row, column = (np.asarray(a) for a in _place(jnp.arange(count, dtype=jnp.int32)))
        want = [(i, j) for i in range(tiles) for j in range(i + 1)]
        assert list(zip(row.tolist(), column.tolist(), strict=True)) == want
    assert TILE % 16 == 0


SMALL = Blocks(Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2), Tiles(64, 32, 4, 2))
ATTENTION = {  # B, T, S, H, G, K
    "whole tiles": (1, 128, 128, 2, 1, 64),
    "documents, ragged": (2, 200, 200, 4, 2, 64),
    "fewer queries than keys, wide heads": (1, 70, 200, 4, 1, 128),
    "queries with nothing to see": (1, 200, 130, 2, 2, 64),
}


def attention_case(name, dtype):
    """(q, k, v, do), (documents of queries, of keys)"""
    B, T, S, H, G, K = ATTENTION[name]
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)]
    arrays = [draw(seed, shape, dtype) for seed, shape in enumerate(shapes)]
    starts = jax.random.bernoulli(jax.random.key(9), 0.03, (B, T))
    docs = jnp.cumsum(starts, 1, dtype=jnp.int32) if "documents" in name else None
    return arrays, (docs, docs)


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [("documents, ragged", FULL, 2e-6), *((name, HALF, 5e-3) for name in ATTENTION)],
)
def test_flash_attention_and_its_gradients_equal_the_reference(name, dtype, tolerance):
    """In bfloat16 also: at most 1.3 times the error of the plain attention, of each result."""
    (q, k, v, do), docs = attention_case(name, dtype)
    fused = lambda *x: flash_attention(*x, *docs, SMALL, True)
    plain = lambda *x: flash_attention_reference(*x, *docs)
    o, pullback = jax.vjp(fused, q, k, v)
    assert o.dtype == dtype
    o_exact, pullback_exact = jax.vjp(plain, *exact(q, k, v))
    o_plain, pullback_plain = jax.vjp(plain, q, k, v)
    got, want = (o, *pullback(do)), (o_exact, *pullback_exact(*exact(do)))
    for x, x_exact, x_plain in zip(got, want, (o_plain, *pullback_plain(do)), strict=True):
        assert off(x, x_exact) < tolerance
        assert dtype == FULL or off(x, x_exact) < 1.3 * off(x_plain, x_exact)


def test_a_query_with_nothing_to_see_gives_zeros_and_no_gradient():
    (q, k, v, do), _ = attention_case("queries with nothing to see", FULL)
    o, pullback = jax.vjp(lambda *x: flash_attention(*x, None, None, SMALL, True), q, k, v)
    blind = q.shape[1] - k.shape[1]
    assert not o[:, :blind].any()
    assert not pullback(do)[0][:, :blind].any()

"""Compares the Triton kernels with float64 references, interpreted on CPU.

JAX_PLATFORMS=cuda python -m pytest -m gpu runs them on a GPU. test_kernels_audit.py checks
without a GPU that they compile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm import add_norm, add_norm_reference
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
from pallas_kernels.qk_rope import qk_rope, qk_rope_reference
from pallas_kernels.symmetric import symmetric, symmetric_reference
from pallas_kernels.tile_order import triangle_tile
from pallas_kernels.tiles import (
    AttentionTiles,
    BlockTiles,
    DqProductTiles,
    FlashAttentionTiles,
    ProductTiles,
)

HALF, FULL = jnp.bfloat16, jnp.float32
INTERPRET = jax.default_backend() != "gpu"
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def float64_enabled():
    with jax.enable_x64(True):
        yield


def draw(seed, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def distance(got, want):
    """Returns the relative Frobenius distance."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def exact(*arrays):
    return [jnp.asarray(x, jnp.float64) for x in arrays]


# Every operation rounds its result to its type, also within a program of several.
@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_allow_excess_precision": False}
)
def with_gradients(function, arrays, cotangents):
    """Returns function(*arrays) and the gradients, compiled as one program.

    A program for each operation would take most of these tests' time to compile.
    """
    y, pullback = jax.vjp(function, *arrays)
    return y, pullback(cotangents)


def assert_reproducible(function, arrays, cotangents, got):
    """Checks that the gradients have the same bits in a second call."""
    _, again = with_gradients(function, arrays, cotangents)
    assert all(map(jnp.array_equal, jax.tree.leaves(got), jax.tree.leaves(again)))


@pytest.fixture
def few_programs(monkeypatch):
    """Lets the backward's programs, of which a GPU has 512, read several blocks of a small array.

    The interpreter executes one program after another.
    """
    monkeypatch.setattr("pallas_kernels.qk_rope.PROGRAMS", 8)


# Rows of several parts, of which the last may end in padding, and several blocks for a program
NORM_TILES = {"norm": BlockTiles(2, 64, 4), "norm_backward": BlockTiles(4, 128, 4, 5)}
NORMS = {  # shape, form, tiles, inputs besides h and the gain
    "rms, ragged": ((3, 37, 192), "rms", NORM_TILES, "y"),
    "rms, fewer rows than a block": ((3, 64), "rms", None, "y"),
    "rms, nothing to add": ((5, 192), "rms", NORM_TILES, ""),
    "layer, biased": ((3, 37, 192), "layer", None, "y bias"),
    "layer, nothing to add": ((60, 96), "layer", NORM_TILES, ""),
    "layer, both biases": ((37, 320), "layer", NORM_TILES, "y y_bias bias"),
    "rms, bias of y": ((12, 200), "rms", NORM_TILES, "y y_bias"),
}
PRECISE = "rms, ragged", "rms, nothing to add", "layer, biased", "layer, both biases"  # in float32
ROUNDED = "rms, ragged", "rms, fewer rows than a block", "layer, nothing to add"  # in bfloat16
ROUNDED += "layer, both biases", "rms, bias of y"


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [*((name, FULL, 2e-6) for name in PRECISE), *((name, HALF, 3e-3) for name in ROUNDED)],
)
def test_add_norm_and_its_gradients_equal_the_reference_and_are_reproducible(
    name, dtype, tolerance
):
    shape, form, tiles, inputs = NORMS[name]
    h, y, ds, dn = (draw(seed, shape, dtype) + seed / 4 for seed in range(4))
    gain, bias, y_bias = (draw(seed, shape[-1:], FULL) for seed in range(4, 7))
    given = {"h": h, "y": y, "gain": 1 + 0.1 * gain, "bias": bias, "y_bias": y_bias}
    given = {key: x for key, x in given.items() if key in ("h", "gain", *inputs.split())}
    pick = lambda given: [given.get(key) for key in ("h", "y", "gain", "bias")]

    def fused(given):
        return add_norm(*pick(given), form, 1e-6, INTERPRET, given.get("y_bias"), tiles)

    (s, n), (got,) = with_gradients(fused, [given], (ds, dn))
    assert s.dtype == n.dtype == dtype
    wide = [x.astype(FULL) for x in (h, y)]
    added = wide[1] + y_bias if "y_bias" in given else wide[1]
    assert jnp.array_equal(s, (wide[0] + added).astype(dtype) if "y" in given else h)
    assert "y" not in given or jnp.array_equal(got["h"], got["y"])
    assert_reproducible(fused, [given], (ds, dn), got)

    def reference(given):  # starts from the rounded sum
        return add_norm_reference(given["s"], None, given["gain"], given.get("bias"), form, 1e-6)

    start = {"s": s} | {key: x for key, x in given.items() if key in ("gain", "bias")}
    start, cotangents = ({k: exact(x)[0] for k, x in start.items()}, tuple(exact(ds, dn)))
    (_, n_exact), (want,) = with_gradients(reference, [start], cotangents)
    assert distance(n, n_exact) < tolerance
    assert distance(got["h"], want.pop("s")) < tolerance
    if "y_bias" in given:  # the sum of rounded gradients
        want["y_bias"] = exact(got["h"])[0].reshape(-1, shape[-1]).sum(0)
    for key, x_exact in want.items():
        assert distance(got[key], x_exact) < 1e-5, key


HEADS = {  # B, T, H, K
    "grouped keys, ragged": (2, 37, 3, 64),
    "wide heads": (1, 50, 4, 128),
    "narrow heads, no power of two": (2, 21, 1, 24),
    "more blocks than programs": (2, 25, 3, 64),
}


def heads_case(name, dtype):
    """Returns (x, dy), (gain, cos, sin)."""
    B, T, H, K = HEADS[name]
    x, dy = (draw(seed, (B, T, H, K), dtype) + seed / 4 for seed in range(2))
    angle_TK = jnp.tile(100 * draw(2, (T, K // 2), FULL), 2)
    return (x, dy), (1 + 0.1 * draw(3, (K,), FULL), jnp.cos(angle_TK), jnp.sin(angle_TK))


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [(name, *((FULL, 2e-6) if "narrow" in name else (HALF, 3e-3))) for name in HEADS],
)
def test_qk_rope_and_its_gradients_equal_the_reference(name, dtype, tolerance):
    (x, dy), (gain, *angles) = heads_case(name, dtype)
    fused = lambda x, gain: qk_rope(x, gain, *angles, 1e-6, INTERPRET)
    y, got = with_gradients(fused, [x, gain], dy)
    reference = lambda x, gain: qk_rope_reference(x, gain, *exact(*angles), 1e-6)
    y_exact, want = with_gradients(reference, exact(x, gain), *exact(dy))
    assert y.dtype == dtype
    assert distance(y, y_exact) < tolerance
    assert distance(got[0], want[0]) < tolerance
    assert distance(got[1], want[1]) < 1e-5


SQUARE = ProductTiles(64, 64, 32, 4, 2)


@pytest.mark.parametrize(
    "shape, dtype, tolerance", [((2, 128, 64), HALF, 3e-3), ((1, 150, 40), FULL, 2e-6)]
)
def test_symmetric_equals_the_product_and_its_own_transpose(shape, dtype, tolerance):
    x = draw(0, shape, dtype)
    got = symmetric(x, tiles=SQUARE, interpret=INTERPRET)
    assert got.dtype == dtype
    assert jnp.array_equal(got, got.mT)
    assert distance(got, symmetric_reference(*exact(x))) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(FULL, 2e-6), (HALF, 3e-3)])
def test_symmetric_adds_a_scaled_matrix_to_a_scaled_product(dtype, tolerance):
    """Computes b A + c A^2 of a Gram matrix with traced b and c, then A times the result."""
    gram = np.asarray(draw(0, (2, 150, 300), FULL))
    gram = jnp.asarray(np.einsum("xmk,xjk->xmj", gram, gram) / 300, dtype)
    scales = (jnp.float32(2.03), jnp.float32(-4.77))

    @jax.jit
    def combine(x, scales):
        square = symmetric(x, x, x, scales, tiles=SQUARE, interpret=INTERPRET)
        return square, symmetric(x, square, tiles=SQUARE, interpret=INTERPRET)

    got, cube = combine(gram, scales)
    assert jnp.array_equal(got, got.mT)
    reference = jax.jit(symmetric_reference)
    (wide,) = exact(gram)
    assert distance(got, reference(wide, wide, wide, scales)) < tolerance
    assert distance(cube, reference(*exact(gram, got))) < tolerance


def test_each_tile_of_a_triangle_is_visited_once():
    for tiles in (1, 7, 300):
        count = tiles * (tiles + 1) // 2
        row, column = map(np.asarray, jax.jit(triangle_tile)(np.arange(count, dtype=np.int32)))
        want = [(i, j) for i in range(tiles) for j in range(i + 1)]
        assert list(zip(row.tolist(), column.tolist(), strict=True)) == want


SMALL = FlashAttentionTiles(
    AttentionTiles(64, 32, 4, 2), AttentionTiles(32, 64, 4, 2), AttentionTiles(64, 32, 4, 2)
)
KEYLESS = 70  # queries with nothing to see, as their document has no key
ATTENTION = {  # B, T, S, H, G, K
    "whole tiles": (1, 128, 128, 2, 1, 64),
    "documents, ragged": (2, 200, 200, 4, 2, 64),
    "window, fewer queries than keys, wide heads": (1, 70, 200, 4, 1, 128),
    "queries with nothing to see, widest heads": (1, 130, 130, 2, 2, 256),
    "window, documents, fewer queries than keys": (2, 150, 200, 2, 1, 16),
}


def attention_case(name, dtype):
    """Returns (q, k, v, do), (documents of queries, of keys), window."""
    B, T, S, H, G, K = ATTENTION[name]
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)]
    arrays = [draw(seed, shape, dtype) for seed, shape in enumerate(shapes)]
    # In the second sequence some blocks of keys lie within a document, and need no mask.
    starts = np.random.default_rng(9).random((B, S)) < np.array([[0.03], [0.01]])[:B]
    docs_BS = jnp.asarray(np.cumsum(starts, 1, dtype=np.int32))
    docs = (docs_BS[:, -T:], docs_BS) if "documents" in name else (None, None)
    if "nothing" in name:
        docs = docs_BS.at[:, :KEYLESS].set(S), docs_BS
    return arrays, docs, 75 if "window" in name else None


@functools.cache
def fused_attention(name, dtype, tiles=SMALL):
    """Returns a case's result and gradients, which a second call must repeat."""
    (*arrays, do), docs, window = attention_case(name, dtype)
    fused = lambda *x: flash_attention(*x, *docs, tiles, INTERPRET, window)
    o, got = with_gradients(fused, arrays, do)
    assert_reproducible(fused, arrays, do, got)
    return o, got


STORING = SMALL._replace(dq=DqProductTiles(64, 32, 4, 2))  # dq is the product of a stored gradient


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [
        *((name, FULL, 2e-6) for name in ATTENTION if "documents" in name),
        *((name, HALF, 5e-3) for name in ATTENTION if name != "documents, ragged"),
    ],
)
def test_flash_attention_and_its_gradients_equal_the_reference_and_are_reproducible(
    name, dtype, tolerance
):
    """In bfloat16 each result has at most 1.3 times the error of plain attention.

    A query that sees no key gives zeros and gets no gradient.
    """
    (q, k, v, do), docs, window = attention_case(name, dtype)
    plain = lambda *x: flash_attention_reference(*x, *docs, window)
    o, got = fused_attention(name, dtype)
    assert o.dtype == dtype
    o_exact, want = with_gradients(plain, exact(q, k, v), *exact(do))
    for x, x_exact in zip((o, *got), (o_exact, *want), strict=True):
        assert distance(x, x_exact) < tolerance
    keyless = KEYLESS * ("nothing" in name)
    assert not o[:, :keyless].any() and not got[0][:, :keyless].any()
    if dtype == FULL:
        return
    o_plain, rounded = with_gradients(plain, [q, k, v], do)
    for x, x_exact, x_plain in zip((o, *got), (o_exact, *want), (o_plain, *rounded), strict=True):
        assert distance(x, x_exact) < 1.3 * distance(x_plain, x_exact)


def test_attentions_gradients_are_the_same_with_a_stored_gradient():
    """Only the order of the sums in dq may differ."""
    name = "window, documents, fewer queries than keys"
    results = [fused_attention(name, HALF, tiles)[1] for tiles in (SMALL, STORING)]
    (dq, *sums), (dq_product, *sums_storing) = results
    assert all(map(jnp.array_equal, sums, sums_storing))
    assert distance(dq_product, dq) < 2e-4

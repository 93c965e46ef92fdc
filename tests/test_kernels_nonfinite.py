"""NaN and infinities reach the kernels' results where they reach the reference's, and no others.

A number that is not finite must never disappear, or a run trains on after its first fault. Nor may
it spread from positions that a query does not see, from other rows, or from padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.add_norm import add_norm, add_norm_reference
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
from pallas_kernels.head_scores import REFERENCE_SHIFT, head_scores, head_scores_reference
from pallas_kernels.qk_rope import qk_rope, qk_rope_reference
from pallas_kernels.symmetric import symmetric, symmetric_reference
from pallas_kernels.tiles import (
    AmpereAttentionTiles,
    AmpereProductTiles,
    AttentionTiles,
    BlockTiles,
    DqProductTiles,
    FlashAttentionTiles,
    MosaicAttentionTiles,
    MosaicProductTiles,
    ProductTiles,
)

ON_GPU = jax.default_backend() == "gpu"
ON_HOPPER = ON_GPU and jax.devices()[0].compute_capability == "9.0"
BODIES = [
    "triton",
    pytest.param("mosaic", marks=pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON)),
]
AMPERE = pytest.param(
    "ampere",
    marks=[
        pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON),
        pytest.mark.skipif(ON_HOPPER, reason="these bodies are for sm_80 to sm_89"),
    ],
)
VALUES = (np.nan, np.inf, -np.inf)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:invalid value"),
]


def draw(*shapes) -> list[Any]:
    """Returns NumPy arrays of random bfloat16 numbers, which both bodies take."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(jnp.bfloat16) for shape in shapes]


def both_ways(function):
    """Returns a compiled function of inputs and cotangent that computes results and gradients."""

    def compute(dy, *inputs):
        y, pullback = jax.vjp(function, *inputs)
        return y, *pullback(dy)

    return jax.jit(compute)


def finite(x):
    return np.isfinite(np.asarray(x, np.float32))


def strict_attention(q_BTHK, k_BSGK, v_BSGK, docs_BT, docs_BS):
    """Attention that never multiplies anything by a masked position, not even zero."""
    (T, H, K), (S, G) = q_BTHK.shape[1:], k_BSGK.shape[1:3]
    visible = jnp.arange(S) <= jnp.arange(T)[:, None] + S - T
    visible = visible & (docs_BT[:, :, None] == docs_BS[:, None, :])
    visible = visible[:, None, :, :, None]
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k_BSGK, v_BSGK))
    q, k, v = (x.astype(jnp.float32).swapaxes(1, 2) for x in (q_BTHK, k, v))
    q = jnp.where(visible, q[:, :, :, None], 0.0)
    k, v = (jnp.where(visible, x[:, :, None], 0.0) for x in (k, v))
    s = jnp.where(visible[..., 0], (q * k).sum(-1) * K**-0.5, -jnp.inf)
    p = jnp.where(visible[..., 0], jax.nn.softmax(s, -1), 0.0)
    return (p[..., None] * v).sum(-2).swapaxes(1, 2).astype(q_BTHK.dtype)


@jax.jit
def expected_attention(docs, *arrays):
    """Returns the results and gradients that strict_attention and the reference give."""
    plain = strict_attention, flash_attention_reference
    return [both_ways(lambda *x, f=f: f(*x, *docs))(*arrays) for f in plain]


ATTENTION_BLOCKS = {
    "triton": FlashAttentionTiles(
        AttentionTiles(32, 16, 4, 1), AttentionTiles(16, 32, 4, 1), AttentionTiles(32, 16, 4, 1)
    ),
    "mosaic": FlashAttentionTiles(
        MosaicAttentionTiles(128, 64, 2),
        MosaicAttentionTiles(64, 128, 2),
        MosaicAttentionTiles(128, 64, 2),
    ),
}
# The bodies of an A40: Ampere's forward, and Triton's pair that stores the scores' gradients.
ATTENTION_BLOCKS["ampere"] = ATTENTION_BLOCKS["triton"]._replace(
    forward=AmpereAttentionTiles(64, 32, 3), dq=DqProductTiles(32, 16, 4, 1)
)
ATTENTION_BLOCKS["storing"] = ATTENTION_BLOCKS["triton"]._replace(dq=DqProductTiles(32, 16, 4, 1))
VARIANTS = FlashAttentionTiles(
    MosaicAttentionTiles(192, 64, 2, variant="folded", groups=3),
    MosaicAttentionTiles(64, 128, 2, variant="turns"),
    MosaicAttentionTiles(128, 64, 2, variant="stored"),
)
# T, S, H, G, K. Interpreted Mosaic is slow, so that its body gets one value for each operand.
ATTENTION_SIZES = {
    "triton": (34, 42, 2, 1, 16),
    "storing": (34, 42, 2, 1, 16),
    "mosaic": (72, 88, 1, 1, 64),
    "ampere": (34, 42, 1, 1, 64),
}


def assert_finite_alike(case, got, needed, allowed):
    """Fails if a result is finite that must not be (needed), or not finite that must be (allowed).

    Args:
        got, needed, allowed: where the results are finite.
    """
    lost, spread = got & ~needed, ~got & allowed
    assert not lost.any(), f"{case}: lost at {np.argwhere(lost).tolist()}"
    assert not spread.any(), f"{case}: spread to {np.argwhere(spread).tolist()}"


@pytest.mark.parametrize("body", [*BODIES, "storing", AMPERE])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_keeps_what_is_not_finite_and_never_spreads_it_from_masked_positions(
    body, documents
):
    """Each row of the batch has one number that is not finite, in one operand.

    It must reach the results that depend on it through visible positions, and may reach those that
    the reference's do. The reference multiplies masked values by probabilities of 0, so a NaN among
    the values reaches all queries, and the kernels' gradients start from the result.
    """
    T, S, H, G, K = ATTENTION_SIZES[body]
    cases = [(operand, value) for operand in range(4) for value in VALUES]
    cases = cases if ATTENTION_SIZES[body][-1] == 16 else cases[documents :: len(VALUES) + 1]
    arrays = draw(*[(len(cases), T, H, K)] * 2, *[(len(cases), S, G, K)] * 2)
    for b, (operand, value) in enumerate(cases):
        position = (10, 20, 10) if operand < 2 else (12, 30, 30)
        arrays[operand][b, position[b % 3], 0, 5] = value
    docs = np.broadcast_to(np.arange(S, dtype=np.int32) // 24, (len(cases), S)) * documents
    docs = docs[:, S - T :], docs
    given, blocks = docs if documents else (None, None), ATTENTION_BLOCKS[body]
    if documents and body == "mosaic":
        blocks = VARIANTS
    fused = lambda q, k, v: flash_attention(q, k, v, *given, blocks, not ON_GPU)
    got, (strict, reference) = both_ways(fused)(*arrays), expected_attention(docs, *arrays)
    for name, *results in zip(("o", "dq", "dk", "dv"), got, strict, reference, strict=True):
        x, needed, allowed = map(finite, results)
        for b, (operand, value) in enumerate(cases):
            case = f"{name}, with {value} in {('do', 'q', 'k', 'v')[operand]}"
            limit = allowed[b] & (operand != 3 or name == "o")
            assert_finite_alike(case, x[b], needed[b], limit)
        both = x & allowed
        x, want = (np.where(both, np.asarray(y, np.float32), 0) for y in (results[0], results[2]))
        np.testing.assert_allclose(x, want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("body", [*BODIES, AMPERE])
@pytest.mark.parametrize("documents", [False, True])
def test_a_query_that_sees_only_scores_of_minus_infinity_gives_nan(body, documents):
    """One that sees no key gives zeros: with documents the first 8, whose document has no key."""
    T, K, keyless = 40, 64, 8 * documents
    q, k, v = draw(*[(1, T, 1, K)] * 3)
    k, lost = np.abs(k), [20, T - 1]
    q[0, lost, 0, 5] = -np.inf
    docs = np.ones((1, T), np.int32)
    docs[:, 24:] = 2
    of_queries = np.where(np.arange(T) < keyless, 0, docs).astype(np.int32)
    given = (of_queries, docs) if documents else (None, None)
    attend = lambda *x: flash_attention(*x, *given, ATTENTION_BLOCKS[body], not ON_GPU)
    want = flash_attention_reference(q, k, v, *given)
    for o in (attend(q, k, v), want):
        assert np.isnan(o[0, lost]).all()
        others = np.delete(np.asarray(o[0], np.float32), lost, 0)
        assert np.isfinite(others).all() and not others[:keyless].any()


PRODUCT_TILES: dict[str, Any] = {
    "triton": ProductTiles(32, 32, 16, 4, 1),
    "mosaic": MosaicProductTiles(128, 128, 64, 2, group=1),
    "ampere": AmpereProductTiles(64, 32, 3),
}


@pytest.mark.parametrize("body", BODIES)
def test_head_scores_keep_what_is_not_finite(body):
    """Rows 0 to 2 of h have one such number each; a tile of w gives logits of -inf only."""
    tiles = PRODUCT_TILES[body]
    h, w = draw((8, 64), (2 * tiles.columns + 64, 64))
    h = np.abs(h)
    h[np.arange(3), 3] = VALUES
    w[tiles.columns : 2 * tiles.columns, 0] = -np.inf
    kept = [
        jax.jit(lambda h, w, r, k=k: head_scores(h, w, r, tiles, 0.0, k, not ON_GPU))
        for k in ("logits", "exponentials")
    ]
    references = [
        jax.jit(lambda h, w, r, k=k: head_scores_reference(h, w, r, 0.0, k))
        for k in ("logits", "exponentials")
    ]
    reference_N = np.full(8, REFERENCE_SHIFT, np.float32)
    for value in (0.0, np.nan, np.inf):  # -inf is in the tile above
        w[5, 7] = value
        case = f"with {value} in w"
        for kernel, reference in zip(kept, references, strict=True):
            got, want = (
                jax.tree.map(np.asarray, f(h, w, reference_N)) for f in (kernel, reference)
            )
            kept_NV, total_N = finite(want.kept_NV), finite(want.total_N)
            assert_finite_alike(case, finite(got.kept_NV), kept_NV, kept_NV)
            assert_finite_alike(case, finite(got.total_N), total_N, total_N)
        assert np.isfinite(got.total_N[3:]).all() == (not np.isnan(value))
    reference_N[4] = np.nan
    assert np.isnan(kept[1](h, w, reference_N).total_N[4])


@pytest.mark.parametrize("body", [*BODIES, AMPERE])
def test_symmetric_keeps_what_is_not_finite(body):
    """Each matrix has one such number, in x, in y or in c; the last two are scaled by one."""
    tiles, M = PRODUCT_TILES[body], 128 if body == "mosaic" else 64
    x, c = draw((9, M, 64), (9, M, M))
    arrays = [x, x.copy(), c + c.mT]
    for matrix, (operand, value) in enumerate((o, v) for o in range(3) for v in VALUES):
        arrays[operand][matrix, 35, 20] = value
    arrays[2][6:, 20, 35] = VALUES
    fused = jax.jit(lambda *args: symmetric(*args, tiles=tiles, interpret=not ON_GPU))
    reference = jax.jit(symmetric_reference)
    # Interpreted Mosaic is slow, so that its body gets one pair.
    for scales in ((1.0, 1.0), (np.nan, 1.0), (1.0, np.inf))[: 3 if body == "triton" else 1]:
        got, want = (finite(f(*arrays, scales)) for f in (fused, reference))
        assert_finite_alike(f"with scales {scales}", np.tril(got), np.tril(want), np.tril(want))
        assert (got == got.mT).all()


@pytest.mark.parametrize("form", ["rms", "layer"])
def test_add_norm_keeps_what_is_not_finite(form):
    """Each row has one such number, in one operand; then the gain and the biases have one."""
    cases = [(operand, value) for operand in range(4) for value in VALUES]
    arrays = draw(*[(len(cases) + 1, 24)] * 4)
    for row, (operand, value) in enumerate(cases):
        arrays[operand][row, 5] = value
    ds, dn, *streams = arrays
    # Rows of several parts; the backward's last part, and the last blocks, end in padding
    tiles = {"norm": BlockTiles(2, 8, 4), "norm_backward": BlockTiles(4, 16, 4, 3)}
    fused = both_ways(
        lambda *x: add_norm(*x[:4], form, 1e-6, not ON_GPU, y_bias_D=x[4], tiles=tiles)
    )
    reference = both_ways(lambda *x: add_norm_reference(*x[:4], form, 1e-6, x[4]))
    for number, value in ((0, 1.0), (0, np.nan), (0, -np.inf), (1, np.inf), (2, np.nan)):
        vectors: list[Any] = [np.full(24, x, np.float32) for x in (1, 0, 0)]
        vectors[number][3] = value
        pair = [f((ds, dn), *streams, *vectors) for f in (fused, reference)]
        for n, (got, want) in enumerate(zip(*map(jax.tree.leaves, pair), strict=True)):
            case = f"result {n}, with {value} in vector {number}"
            assert_finite_alike(case, finite(got), finite(want), finite(want))


def test_qk_rope_keeps_what_is_not_finite():
    """Each batch row has one such number, in one operand; then the gain and the tables have one."""
    cases = [(operand, value) for operand in range(2) for value in VALUES]
    arrays = draw(*[(len(cases) + 1, 5, 2, 16)] * 2)
    for row, (operand, value) in enumerate(cases):
        arrays[operand][row, 2, 1, 11] = value
    angles = np.tile(draw((5, 8))[0].astype(np.float32), 2)
    tables: list[Any] = [np.ones(16, np.float32), np.cos(angles), np.sin(angles)]
    fused = both_ways(lambda x, *rest: qk_rope(x, *rest, interpret=not ON_GPU))
    reference = both_ways(lambda x, *rest: qk_rope_reference(x, *rest, eps=1e-6))
    for poisoned in (None, 0, 1, 2):
        changed = [x.copy() for x in tables]
        if poisoned is not None:
            changed[poisoned][..., [3, 11]] = np.nan  # in both halves
        pair = [f(*arrays, *changed)[:3] for f in (fused, reference)]
        for n, (got, want) in enumerate(zip(*pair, strict=True)):
            case = f"result {n}, with nan in table {poisoned}"
            assert_finite_alike(case, finite(got), finite(want), finite(want))


def test_padding_adds_nothing_to_the_gradients_of_gains_without_eps():
    """With eps = 0, the statistics of a row of zeros are infinite."""
    h, x, *cotangents = map(
        jnp.asarray, draw((6, 24), (1, 5, 3, 16), (6, 24), (6, 24), (1, 5, 3, 16))
    )
    table = jnp.ones((5, 16))

    @jax.jit
    def gradients(gain_D, gain_K):
        normed = lambda gain: add_norm(h, None, gain, None, "rms", 0.0, not ON_GPU)
        rotated = lambda gain: qk_rope(x, gain, table, table, 0.0, not ON_GPU)
        (dgain_D,) = jax.vjp(normed, gain_D)[1](tuple(cotangents[:2]))
        (dgain_K,) = jax.vjp(rotated, gain_K)[1](cotangents[2])
        return dgain_D, dgain_K

    for dgain in gradients(np.ones(24, np.float32), np.ones(16, np.float32)):
        assert finite(dgain).all()

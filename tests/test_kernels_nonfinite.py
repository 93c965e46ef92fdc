"""NaN and infinities reach the kernels' results where they reach the reference's, and no others.

A number that is not finite must never disappear, or a run trains on after its first fault. Nor may
it spread from positions that a query does not see, from other rows, or from padding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
from pallas_kernels.tile_order import MASKED
from pallas_kernels.tiles import (
    AttentionTiles,
    FlashAttentionTiles,
    MosaicAttentionTiles,
)

ON_GPU = jax.default_backend() == "gpu"
BODIES = [
    "triton",
    pytest.param("mosaic", marks=pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON)),
]
VALUES = (np.nan, np.inf, -np.inf)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:invalid value"),
]


def draw(*shapes):
    """Returns bfloat16 arrays of random numbers, so that both bodies take them."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draws = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in draws]


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
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    visible = jnp.arange(S) <= jnp.arange(T)[:, None] + S - T
    visible = jnp.broadcast_to(visible, (B, T, S))
    if docs_BT is not None:
        visible &= docs_BT[:, :, None] == docs_BS[:, None, :]
    visible = visible[:, None, :, :, None]
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k_BSGK, v_BSGK))
    q, k, v = (x.astype(jnp.float32).swapaxes(1, 2) for x in (q_BTHK, k, v))
    q = jnp.where(visible, q[:, :, :, None], 0.0)
    k, v = (jnp.where(visible, x[:, :, None], 0.0) for x in (k, v))
    s = jnp.where(visible[..., 0], (q * k).sum(-1) * K**-0.5, MASKED)
    p = jnp.where(visible[..., 0], jax.nn.softmax(s, -1), 0.0)
    return (p[..., None] * v).sum(-2).swapaxes(1, 2).astype(q_BTHK.dtype)


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
# T, S, H, G, K. Interpreted Mosaic is slow, so that its body gets one value for each operand.
ATTENTION_SIZES = {"triton": (34, 42, 2, 1, 16), "mosaic": (72, 88, 1, 1, 64)}


def assert_finite_alike(case, got, needed, allowed):
    """Fails if a result is finite that must not be (needed), or not finite that must be (allowed).

    Args:
        got, needed, allowed: where the results are finite.
    """
    lost, spread = got & ~needed, ~got & allowed
    assert not lost.any(), f"{case}: lost at {np.argwhere(lost).tolist()}"
    assert not spread.any(), f"{case}: spread to {np.argwhere(spread).tolist()}"


@pytest.mark.parametrize("body", BODIES)
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
    cases = cases if body == "triton" else cases[documents :: len(VALUES) + 1]
    arrays = draw(*[(len(cases), T, H, K)] * 2, *[(len(cases), S, G, K)] * 2)
    for b, (operand, value) in enumerate(cases):
        position = (10, 20, 10) if operand < 2 else (12, 30, 30)
        arrays[operand] = arrays[operand].at[b, position[b % 3], 0, 5].set(value)
    docs = None, None
    if documents:
        docs = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) // 24, (len(cases), S))
        docs = docs[:, S - T :], docs
    fused = lambda *x: flash_attention(*x, *docs, ATTENTION_BLOCKS[body], not ON_GPU)
    got = both_ways(fused)(*arrays)
    reference = both_ways(lambda *x: flash_attention_reference(*x, *docs))(*arrays)
    strict = both_ways(lambda *x: strict_attention(*x, *docs))(*arrays)
    for name, *results in zip(("o", "dq", "dk", "dv"), got, strict, reference, strict=True):
        x, needed, allowed = map(finite, results)
        for b, (operand, value) in enumerate(cases):
            case = f"{name}, with {value} in {('do', 'q', 'k', 'v')[operand]}"
            limit = allowed[b] & (operand != 3 or name == "o")
            assert_finite_alike(case, x[b], needed[b], limit)
        both = x & allowed
        x, want = (np.where(both, np.asarray(y, np.float32), 0) for y in (results[0], results[2]))
        np.testing.assert_allclose(x, want, atol=0.05, rtol=0.05)

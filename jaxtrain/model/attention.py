"""Causal grouped-query attention: (q_BTHK, k_BTGK, v_BTGK, docs_BT | None, scoring) -> o_BTHK.

Scores are scaled by 1/sqrt(K) unless `scoring` has another scale; the softmax is computed in
float32. With docs, a token attends only to its own document. R is the number of query heads that
share a key/value head: H = G * R.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxtrain.model.dense import wide_dtype
from jaxtrain.ops import fused
from jaxtrain.ops.routes import Route

MASKED = -1e30  # finite, so that a fully masked row gives no NaN
BLOCKS = 4  # of queries; each skips the keys after its last query: 5/8 of all scores are computed
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX primitive: output and log-sum-exp


class Scoring(NamedTuple):
    """How a layer turns queries and keys into scores: hashable, a constant of the program."""

    window: int = 0  # a query sees this many last keys, its own position's included; 0: all
    scale: float = 0.0  # factor of queries x keys; 0: 1/sqrt(K)
    softcap: float = 0.0  # c in c * tanh(s / c), as in Gemma 2, arxiv.org/abs/2408.00118; 0: none

    def scale_of(self, K: int) -> float:
        return self.scale or K**-0.5

    def cap(self, s: jax.Array) -> jax.Array:
        """Applies the soft-cap to scores of any shape."""
        return self.softcap * jnp.tanh(s / self.softcap) if self.softcap else s


CAUSAL = Scoring()


def _mask(
    T: int,
    S: int,
    docs_BT: jax.Array | None,
    window: int,
    start: jax.Array | int = 0,
    first: int = 0,
) -> jax.Array:
    """Returns booleans [1 or B,1,1,T,S]: whether query start+t may attend to key first+s."""
    query_T1, key_1S = (start + jnp.arange(T))[:, None], jnp.arange(first, first + S)[None, :]
    visible = query_T1 >= key_1S
    if window:
        visible &= query_T1 < key_1S + window
    if docs_BT is None:
        return visible[None, None, None]
    same_document = docs_BT[:, start : start + T, None] == docs_BT[:, None, first : first + S]
    return (visible & same_document)[:, None, None]


def _group_heads(q_BTHK, G):
    B, T, H, K = q_BTHK.shape
    return q_BTHK.reshape(B, T, G, H // G, K)


def attention_reference(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    docs_BT: jax.Array | None = None,
    scoring: Scoring = CAUSAL,
) -> jax.Array:
    """Reference implementation; materialises [B,H,T,T], with a window only blocks around it."""
    T, outputs = q_BTHK.shape[1], []
    for first, start, stop in _block_bounds(T, scoring.window) if scoring.window else [(0, 0, T)]:
        mask = _mask(stop - start, stop - first, docs_BT, scoring.window, start, first)
        q, k, v = q_BTHK[:, start:stop], k_BTGK[:, first:stop], v_BTGK[:, first:stop]
        outputs.append(_attend_masked(q, k, v, mask, scoring))
    return jnp.concatenate(outputs, 1) if len(outputs) > 1 else outputs[0]


def attend_cached(
    cache: dict[str, jax.Array],
    start: jax.Array | int,
    scoring: Scoring,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Writes keys and values into a cache [B,S,G,K] at start, then attends over it."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    k_BSGK, v_BSGK = write(cache["k"], k_BTGK), write(cache["v"], v_BTGK)
    mask = _mask(q_BTHK.shape[1], k_BSGK.shape[1], None, scoring.window, start)
    o_BTHK = _attend_masked(q_BTHK, k_BSGK, v_BSGK, mask, scoring)
    return o_BTHK, {"k": k_BSGK, "v": v_BSGK}


def _attend_masked(q_BTHK, k_BSGK, v_BSGK, mask, scoring):
    wide = wide_dtype(q_BTHK.dtype)
    q_BTGRK = _group_heads(q_BTHK, k_BSGK.shape[2])
    s = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide)
    s = scoring.cap(s * scoring.scale_of(q_BTHK.shape[-1]))
    s = jnp.where(mask, s, MASKED)
    p = jax.nn.softmax(s, axis=-1).astype(v_BSGK.dtype)
    o_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", p, v_BSGK, preferred_element_type=wide)
    return o_BTGRK.reshape(q_BTHK.shape).astype(q_BTHK.dtype)


def _block_bounds(T, window):
    """Returns (first key, first query, last query + 1) of each block of queries.

    A block computes scores with window - 1 keys before its own, so short blocks waste the least.
    """
    size = -(-T // BLOCKS)
    if window:
        size = min(size, max(window, -(-size // BLOCKS)))  # at most BLOCKS**2, to compile fast
    first_key = lambda start: max(0, start - window + 1) if window else 0
    return [(first_key(start), start, min(start + size, T)) for start in range(0, T, size)]


def _blocked_forward(q, k, v, docs_BT, scoring):
    """q [B,G,R,T,K], k and v [B,G,T,K] -> o [B,G,R,T,K] and each block's probabilities."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=wide_dtype(q.dtype))
    outputs, probabilities = [], []
    for first, start, stop in _block_bounds(q.shape[3], scoring.window):
        s = einsum("BGRTK,BGSK->BGRTS", q[:, :, :, start:stop], k[:, :, first:stop])
        mask = _mask(stop - start, stop - first, docs_BT, scoring.window, start, first)
        s = jnp.where(mask, scoring.cap(s), MASKED)
        e = jnp.exp(s - s.max(-1, keepdims=True))  # at most 1: no overflow
        p = (e / e.sum(-1, keepdims=True)).astype(v.dtype)
        outputs.append(einsum("BGRTS,BGSK->BGRTK", p, v[:, :, first:stop]).astype(q.dtype))
        probabilities.append(p)
    return jnp.concatenate(outputs, 3), tuple(probabilities)


def _blocked_backward(q, k, v, probabilities, do, scoring):
    """Returns (dq, dk, dv).

    For p = softmax(s) and o = p v: dp = do v^T, and ds = p * (dp - sum(p * dp)), since every
    probability depends on every score through the normalisation. With a soft-cap c the scores are
    computed again: the derivative of c * tanh(s / c) by s is 1 - tanh(s / c)^2.
    """
    wide = wide_dtype(q.dtype)
    einsum = functools.partial(jnp.einsum, preferred_element_type=wide)
    dq, dk, dv = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    blocks = _block_bounds(q.shape[3], scoring.window)
    for (first, start, stop), p in zip(blocks, probabilities, strict=True):
        g = do[:, :, :, start:stop]
        dp = einsum("BGRTK,BGSK->BGRTS", g, v[:, :, first:stop])
        p32 = p.astype(wide)
        ds = p32 * (dp - (p32 * dp).sum(-1, keepdims=True))
        if scoring.softcap:
            s = einsum("BGRTK,BGSK->BGRTS", q[:, :, :, start:stop], k[:, :, first:stop])
            ds = ds * (1 - jnp.tanh(s / scoring.softcap) ** 2)
        ds = ds.astype(q.dtype)
        dq.append(einsum("BGRTS,BGSK->BGRTK", ds, k[:, :, first:stop]).astype(q.dtype))
        dk = dk.at[:, :, first:stop].add(einsum("BGRTS,BGRTK->BGSK", ds, q[:, :, :, start:stop]))
        dv = dv.at[:, :, first:stop].add(einsum("BGRTS,BGRTK->BGSK", p, g))
    return jnp.concatenate(dq, 3), dk.astype(k.dtype), dv.astype(v.dtype)


def _blocked_output(q, k, v, docs_BT, scoring):
    return _blocked_forward(q, k, v, docs_BT, scoring)[0]


def _blocked_fwd(q, k, v, docs_BT, scoring):
    o, probabilities = _blocked_forward(q, k, v, docs_BT, scoring)
    return o, (q, k, v, probabilities)


def _blocked_bwd(scoring, residuals, do):
    q, k, v, probabilities = residuals
    return *_blocked_backward(q, k, v, probabilities, do, scoring), None


_blocked = jax.custom_vjp(_blocked_output, nondiff_argnums=(4,))
_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def attention_blocked(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    docs_BT: jax.Array | None = None,
    scoring: Scoring = CAUSAL,
) -> jax.Array:
    """Computes attention in query blocks, with a hand-written backward: the route of CPUs.

    A block skips the keys after its last query and those before its first query's window. Saves
    the probabilities for the backward in v's dtype: 5/8 of [B,H,T,T], less with a window.
    """
    B, T, H, K = q_BTHK.shape
    scale = jnp.asarray(scoring.scale_of(K), q_BTHK.dtype)
    q = _group_heads(q_BTHK * scale, k_BTGK.shape[2])
    o = _blocked(
        q.transpose(0, 2, 3, 1, 4),
        k_BTGK.transpose(0, 2, 1, 3),
        v_BTGK.transpose(0, 2, 1, 3),
        docs_BT,
        scoring,
    )
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def attention_blocked_wide(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    docs_BT: jax.Array | None = None,
    scoring: Scoring = CAUSAL,
) -> jax.Array:
    """Runs attention_blocked in float32, for CPUs without bf16 products."""
    q, k, v = (x.astype(wide_dtype(x.dtype)) for x in (q_BTHK, k_BTGK, v_BTGK))
    return attention_blocked(q, k, v, docs_BT, scoring).astype(q_BTHK.dtype)


def attention_cudnn(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    docs_BT: jax.Array | None = None,
    scoring: Scoring = CAUSAL,
) -> jax.Array:
    """Runs cuDNN's flash attention, in half precision and without document masks."""
    possible = docs_BT is None and not scoring.softcap
    assert possible, "choose_routes never selects cuDNN with document masks or a soft-cap"
    window = (scoring.window - 1, 0) if scoring.window else None  # keys before and after a query
    return jax.nn.dot_product_attention(
        *(q_BTHK, k_BTGK, v_BTGK),
        scale=scoring.scale or None,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )


ATTENTION = {
    "reference": attention_reference,
    "blocked": attention_blocked,
    "blocked_wide": attention_blocked_wide,
    "cudnn": attention_cudnn,
}


def attend(
    route: Route,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    docs_BT: jax.Array | None = None,
    mesh: Mesh | None = None,
    scoring: Scoring = CAUSAL,
) -> jax.Array:
    """Runs the route's attention and names the result "attention" for remat policies.

    Args:
        mesh: mesh over which q, k and v are sharded; XLA's own implementations ignore it.
    """
    if scoring.window >= q_BTHK.shape[1]:  # it hides no key
        scoring = scoring._replace(window=0)
    if route.is_fused:  # the kernel names its result and its log-sum-exp itself
        only_window = Scoring(scoring.window)
        assert scoring == only_window, "choose_routes never selects a kernel for other scores"
        attention = fused.build_attention(route, mesh, scoring.window or None)
        return attention(q_BTHK, k_BTGK, v_BTGK, docs_BT)
    attention = functools.partial(ATTENTION[route.implementation], docs_BT=docs_BT, scoring=scoring)
    if route.implementation == "cudnn":  # remat saves CUDNN_FORWARD; a name would save it twice
        return fused.map_heads(attention, mesh)(q_BTHK, k_BTGK, v_BTGK)
    o_BTHK = attention(q_BTHK, k_BTGK, v_BTGK)
    return checkpoint_name(o_BTHK, "attention")

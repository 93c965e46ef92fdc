"""The Triton bodies of flash_attention's backward: one kernel for dk and dv, one for dq.

The first owns a block of keys and sums over the queries of all heads that share its key head; the
second owns a block of queries and sums over the keys. Both recompute the probabilities, as
exp2(score - L) from the stored log-sum-exp L in units of log2(e). There are no atomics, so sums
have a fixed order. Blocks that need no mask have their own loop (key_blocks.py, query_blocks.py).

The kernel for dk and dv computes the scores as [keys,queries]. The probabilities and the scores'
gradient are then in the registers where the next product needs them; as [queries,keys] they would
be transposed through shared memory.

Bound: compute, 2 times the forward's FLOPs for dk and dv, 1.5 times for dq.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2; scores as [keys,queries] as in
Triton's tutorial 06, https://triton-lang.org/main/getting-started/tutorials/06-fused-attention.html
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import key_blocks, query_blocks, triton
from pallas_kernels.attention_mask import exponent_scale, visible_pairs
from pallas_kernels.tile_order import EMPTY_ROW_LSE
from pallas_kernels.tiles import AttentionTiles


def _softmax_gradient(s, dp, lse, delta, mask, interpret, scale):
    """Returns the probabilities and the scores' gradient, without its factor 1/sqrt(K).

    Softmax's gradient is p * (dp - sum(p * dp)); the sum is delta, which equals sum(o * do).
    """
    p = triton.exp2(s, scale, lse, interpret)
    ds = p * (dp - delta)
    if mask is not None:  # 0 * (dp - delta) may be nan
        p, ds = (jnp.where(mask, x, 0.0) for x in (p, ds))
    return p, ds


def _read_queries(head, refs, rows, inside):
    """Reads q, do, log-sum-exp and delta of some queries."""
    q_ref, do_ref, lse_ref, delta_ref = refs
    q, do = (head.read(ref, rows, inside) for ref in (q_ref, do_ref))
    lse = head.read_vector(lse_ref, rows, EMPTY_ROW_LSE, inside)
    return q, do, lse, head.read_vector(delta_ref, rows, 0.0, inside)


def _dkv_kernel(*refs, tiles, group, window, interpret):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *docs, dk_ref, dv_ref = refs
    T, S, K = q_ref.shape[1], k_ref.shape[1], q_ref.shape[3]
    block, shared_head, batch = (pl.program_id(i) for i in range(3))
    key_head = triton.Head(batch, shared_head)
    columns = block * tiles.keys + jnp.arange(tiles.keys)
    k, v = key_head.read(k_ref, columns), key_head.read(v_ref, columns)

    def add_block(query_head, i, carry, masked):
        dk, dv = carry
        rows = i * tiles.queries + jnp.arange(tiles.queries)
        sources = q_ref, do_ref, lse_ref, delta_ref
        q, do, lse, delta = _read_queries(query_head, sources, rows, not masked)
        s, dp = triton.dot(k, q, trans_b=True), triton.dot(v, do, trans_b=True)
        mask = None
        if masked:
            mask = visible_pairs(batch, rows, columns, T, S, docs[:2], window, keys_first=True)
        p, ds = _softmax_gradient(
            s, dp, lse[None, :], delta[None, :], mask, interpret, exponent_scale(K)
        )
        return dk + triton.dot(ds.astype(q.dtype), q), dv + triton.dot(p.astype(do.dtype), do)

    visits = query_blocks.causal_visits(block, tiles, T, S, window)
    if docs:
        bounds = (docs[2][batch, block, i] for i in range(2))
        visits = query_blocks.within_documents(visits, *bounds)

    def add_head(n, carry):
        query_head = triton.Head(batch, shared_head * group + n)
        return visits.loop(functools.partial(add_block, query_head), carry)

    zero = jnp.zeros((tiles.keys, K), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, add_head, (zero, zero))
    key_head.write(dk_ref, columns, dk * K**-0.5)
    key_head.write(dv_ref, columns, dv)


def _dq_kernel(*refs, tiles, group, window, interpret):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *docs, dq_ref = refs
    T, S, K = q_ref.shape[1], k_ref.shape[1], q_ref.shape[3]
    block, head, batch = (pl.program_id(i) for i in range(3))
    block = pl.num_programs(0) - 1 - block  # the longest first, so that no long one starts last
    query_head, key_head = triton.Head(batch, head), triton.Head(batch, head // group)
    rows = block * tiles.queries + jnp.arange(tiles.queries)
    sources = q_ref, do_ref, lse_ref, delta_ref
    q, do, lse, delta = _read_queries(query_head, sources, rows, inside=False)

    def add_block(j, dq, masked):
        columns = j * tiles.keys + jnp.arange(tiles.keys)
        k, v = (key_head.read(ref, columns, not masked) for ref in (k_ref, v_ref))
        s, dp = triton.dot(q, k, trans_b=True), triton.dot(do, v, trans_b=True)
        mask = visible_pairs(batch, rows, columns, T, S, docs[:2], window) if masked else None
        _, ds = _softmax_gradient(
            s, dp, lse[:, None], delta[:, None], mask, interpret, exponent_scale(K)
        )
        return dq + triton.dot(ds.astype(k.dtype), k)

    visits = key_blocks.causal_visits(block, tiles, T, S, window)
    if docs:
        visits = visits.within_documents(*(docs[2][batch, block, i] for i in range(2)))
    dq = visits.loop(add_block, jnp.zeros((tiles.queries, K), jnp.float32))
    query_head.write(dq_ref, rows, dq * K**-0.5)


def gradients(
    name: str,
    arguments: Sequence[jax.Array],
    tiles: AttentionTiles,
    interpret: bool,
    window: int | None,
) -> jax.Array | list[jax.Array]:
    """Runs the kernel "dkv", which returns [dk_BSGK, dv_BSGK], or "dq", which returns dq_BTHK.

    Args:
        arguments: q, k, v, do, log-sum-exp, delta, and the documents of queries and keys or none.
    """
    q, k, v, *_ = arguments
    (B, T, H, _), (_, S, G, _) = q.shape, k.shape
    docs = arguments[6:]
    if name == "dkv":
        kernel, shapes = _dkv_kernel, [triton.like(k), triton.like(v)]
        grid = (pl.cdiv(S, tiles.keys), G, B)
        bounds = [query_blocks.document_bounds(docs[0], docs[1], tiles)] if docs else []
    else:
        kernel, shapes = _dq_kernel, triton.like(q)
        grid = (pl.cdiv(T, tiles.queries), H, B)
        bounds = [key_blocks.document_bounds(docs[0], docs[1], tiles, window)] if docs else []
    call = triton.call(
        functools.partial(kernel, tiles=tiles, group=H // G, window=window, interpret=interpret),
        name=f"flash_attention_{name}",
        grid=grid,
        out_shape=shapes,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return call(*arguments, *bounds)

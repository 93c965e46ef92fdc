"""The Triton bodies of flash_attention's backward: one kernel for dk and dv, one for dq.

The first owns a block of keys and sums over the queries of all heads that share its key head; the
second owns a block of queries and sums over the keys. Both recompute the probabilities, as
exp2(score - L) from the stored log-sum-exp L in units of log2(e). There are no atomics, so sums
have a fixed order. Blocks that need no mask have their own loop (key_blocks.py, query_blocks.py).

The kernel for dk and dv computes the scores as [keys,queries]. The probabilities and the scores'
gradient are then in the registers where the next product needs them; as [queries,keys] they would
be transposed through shared memory.

Together the two make seven products, where five suffice. For DqProductTiles, the first kernel
stores the scores' gradient, and a third one multiplies it by the keys. On an A40 at its peaks, the
two products saved take 4*K/149.7e12 s a score, 3.4 ps with K=128 and 1.7 ps with K=64, and the 4
bytes written and read take 5.7 ps, half of them beside the four other products (6.8 and 3.4 ps).
So it gains 19 % with K=128 if the stores are hidden behind those products, and with K=64 nothing
until the products run below 89 % of the peak. No A40 has measured it: it is a candidate.

Partial sums of dq in float32, one for each block of keys, need no [S,T] matrix, but for each pair
of a query and a block they write and read 8*K bytes to save 4*K*keys FLOPs. That is keys/2 FLOPs a
byte at any length and K, where an A40 makes 215 and an H100 295 in that time: blocks of 64 or 128
keys lose, and larger ones do not fit in the registers.

Bound: compute, 2 times the forward's FLOPs for dk and dv, 1.5 times for dq or half of it.

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
from pallas_kernels.tiles import AttentionTiles, DqProductTiles


def _softmax_gradient(s, dp, lse, delta, mask, interpret, K):
    """Returns the probabilities and the scores' gradient, without its factor 1/sqrt(K).

    Softmax's gradient is p * (dp - sum(p * dp)); the sum is delta, which equals sum(o * do).
    """
    p = triton.exp2(s, exponent_scale(K), lse, interpret)
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


def _visits_of_keys(batch, block, docs, tiles, T, S, window):
    """Returns the visits of a block of keys; docs is empty, or its last ref has the bounds."""
    visits = query_blocks.causal_visits(block, tiles, T, S, window)
    if docs:
        bounds = (docs[2][batch, block, i] for i in range(2))
        visits = query_blocks.within_documents(visits, *bounds)
    return visits


def _visits_of_queries(batch, block, docs, tiles, T, S, window):
    """Returns the visits of a block of queries; docs is empty, or its last ref has the bounds."""
    visits = key_blocks.causal_visits(block, tiles, T, S, window)
    if docs:
        visits = visits.within_documents(*(docs[2][batch, block, i] for i in range(2)))
    return visits


def _own_queries(tiles, group):
    """Returns this program's batch row, block of queries, their positions, head and key head."""
    block, head, batch = (pl.program_id(i) for i in range(3))
    block = pl.num_programs(0) - 1 - block  # the longest first, so that no long one starts last
    rows = block * tiles.queries + jnp.arange(tiles.queries)
    return batch, block, rows, triton.Head(batch, head), triton.Head(batch, head // group)


def _dkv_kernel(*refs, tiles, group, window, interpret, stores_ds):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs = refs
    *docs, dk_ref, dv_ref = refs[:-1] if stores_ds else refs
    T, S, K = q_ref.shape[1], k_ref.shape[1], q_ref.shape[3]
    block, shared_head, batch = (pl.program_id(i) for i in range(3))
    key_head = triton.Head(batch, shared_head)
    columns = block * tiles.keys + jnp.arange(tiles.keys)
    k, v = key_head.read(k_ref, columns), key_head.read(v_ref, columns)
    visits = _visits_of_keys(batch, block, docs, tiles, T, S, window)

    def add_block(query_head, i, carry, masked):
        dk, dv = carry
        rows = i * tiles.queries + jnp.arange(tiles.queries)
        sources = q_ref, do_ref, lse_ref, delta_ref
        q, do, lse, delta = _read_queries(query_head, sources, rows, not masked)
        s, dp = triton.dot(k, q, trans_b=True), triton.dot(v, do, trans_b=True)
        mask = None
        if masked:
            mask = visible_pairs(batch, rows, columns, T, S, docs[:2], window, keys_first=True)
        p, ds = _softmax_gradient(s, dp, lse[None, :], delta[None, :], mask, interpret, K)
        p, ds = p.astype(do.dtype), ds.astype(q.dtype)
        if stores_ds:
            query_head.write_pairs(refs[-1], columns, rows, ds)
        return dk + triton.dot(ds, q), dv + triton.dot(p, do)

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
    batch, block, rows, query_head, key_head = _own_queries(tiles, group)
    sources = q_ref, do_ref, lse_ref, delta_ref
    q, do, lse, delta = _read_queries(query_head, sources, rows, inside=False)

    def add_block(j, dq, masked):
        columns = j * tiles.keys + jnp.arange(tiles.keys)
        k, v = (key_head.read(ref, columns, not masked) for ref in (k_ref, v_ref))
        s, dp = triton.dot(q, k, trans_b=True), triton.dot(do, v, trans_b=True)
        mask = visible_pairs(batch, rows, columns, T, S, docs[:2], window) if masked else None
        _, ds = _softmax_gradient(s, dp, lse[:, None], delta[:, None], mask, interpret, K)
        return dq + triton.dot(ds.astype(k.dtype), k)

    visits = _visits_of_queries(batch, block, docs, tiles, T, S, window)
    dq = visits.loop(add_block, jnp.zeros((tiles.queries, K), jnp.float32))
    query_head.write(dq_ref, rows, dq * K**-0.5)


def _dq_product_kernel(ds_ref, k_ref, *refs, tiles, group, window):
    *docs, dq_ref = refs
    (S, T), K = ds_ref.shape[2:], k_ref.shape[3]
    batch, block, rows, query_head, key_head = _own_queries(tiles, group)

    def add_block(j, dq, masked):
        columns = j * tiles.keys + jnp.arange(tiles.keys)
        ds = query_head.read_pairs(ds_ref, columns, rows, not masked)
        if masked:  # where no query of a block sees a key, nothing was written
            mask = visible_pairs(batch, rows, columns, T, S, docs[:2], window, keys_first=True)
            ds = jnp.where(mask, ds, 0.0).astype(ds.dtype)
        k = key_head.read(k_ref, columns, not masked)
        return dq + triton.dot(ds, k, trans_a=True)

    visits = _visits_of_queries(batch, block, docs, tiles, T, S, window)
    dq = visits.loop(add_block, jnp.zeros((tiles.queries, K), jnp.float32))
    query_head.write(dq_ref, rows, dq * K**-0.5)


def _call(kernel, name, arrays, docs, bounds_of, grid, shapes, tiles, interpret):
    """Runs a kernel on arrays, documents, and the bounds of its blocks if there are documents."""
    call = triton.call(
        functools.partial(kernel, tiles=tiles),
        name=f"flash_attention_{name}",
        grid=grid,
        out_shape=shapes,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return call(*arrays, *docs, *([bounds_of(*docs, tiles)] if docs else []))


def dkv(
    arguments: Sequence[jax.Array],
    tiles: AttentionTiles,
    interpret: bool,
    window: int | None,
    stores_ds: bool = False,
) -> list[jax.Array]:
    """Returns [dk_BSGK, dv_BSGK].

    Args:
        arguments: q, k, v, do, log-sum-exp, delta, and the documents of queries and keys or none.
        stores_ds: returns the scores' gradient too, for dq_product: [B,H,S,T] in q.dtype, without
            its factor 1/sqrt(K). Blocks without a query that sees a key are not written.
    """
    q, k, v = arguments[:3]
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    shapes = [triton.like(k), triton.like(v)]
    if stores_ds:
        shapes.append(triton.like(q, shape=(B, H, S, T)))
    options = {"group": H // G, "window": window, "interpret": interpret}
    kernel = functools.partial(_dkv_kernel, **options, stores_ds=stores_ds)
    grid, bounds_of = (pl.cdiv(S, tiles.keys), G, B), query_blocks.document_bounds
    split = arguments[:6], arguments[6:]
    return _call(kernel, "dkv", *split, bounds_of, grid, shapes, tiles, interpret)


def _call_of_queries(kernel, name, arrays, arguments, tiles, interpret, window):
    """Runs a kernel for dq; returns dq_BTHK."""
    q, k = arguments[:2]
    B, T, H, _ = q.shape
    kernel = functools.partial(kernel, group=H // k.shape[2], window=window)
    grid = pl.cdiv(T, tiles.queries), H, B
    bounds_of = functools.partial(key_blocks.document_bounds, window=window)
    split = arrays, arguments[6:]
    return _call(kernel, name, *split, bounds_of, grid, triton.like(q), tiles, interpret)


def dq(
    arguments: Sequence[jax.Array], tiles: AttentionTiles, interpret: bool, window: int | None
) -> jax.Array:
    """Returns dq_BTHK; the arguments are those of dkv."""
    kernel = functools.partial(_dq_kernel, interpret=interpret)
    return _call_of_queries(kernel, "dq", arguments[:6], arguments, tiles, interpret, window)


def dq_product(
    arguments: Sequence[jax.Array],
    ds_BHST: jax.Array,
    tiles: DqProductTiles,
    interpret: bool,
    window: int | None,
) -> jax.Array:
    """Returns dq_BTHK from the scores' gradient that dkv returned; the arguments are dkv's."""
    arrays, kernel = (ds_BHST, arguments[1]), _dq_product_kernel
    return _call_of_queries(kernel, "dq_stored", arrays, arguments, tiles, interpret, window)

"""Causal attention that never holds [T,S]: softmax block by block, and its backward, recomputed.

Queries stand at the end of the keys: query t sees keys up to t + S - T, in its document where
documents are given. H query heads share G key/value heads. All sums are float32, in one order.

Bound: compute, from T of about 1,000 on. Causal FLOPs: forward 2*B*H*K*T*(2S-T+1), backward 3.5
times that (2 for dk and dv, 1.5 for dq: both make the scores anew; 2.5 is usually counted). Forward
moves the bytes of q, k, v, o and 4*B*H*T of the log-sum-exp.

Source: Dao 2023, https://arxiv.org/abs/2307.08691; base 2 softmax as in Triton's tutorial 06,
https://triton-lang.org/main/getting-started/tutorials/06-fused-attention.html
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.tile_order import EMPTY_ROW_LSE, MASKED
from pallas_kernels.tiles import body_of


def flash_attention_reference(q_BTHK, k_BSGK, v_BSGK, docs_BT=None, docs_BS=None):
    """The law: -> [B,T,H,K] in q.dtype, softmax in at least float32; a blind query gives 0."""
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    s = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide) * K**-0.5
    seen = jnp.arange(S) <= jnp.arange(T)[:, None] + S - T
    seen = jnp.broadcast_to(seen, (B, 1, 1, T, S))
    if docs_BT is not None:
        seen &= (docs_BT[:, :, None] == docs_BS[:, None, :])[:, None, None]
    p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s, MASKED), -1), 0.0)
    o = jnp.einsum("BGRTS,BSGK->BTGRK", p.astype(v_BSGK.dtype), v_BSGK, preferred_element_type=wide)
    return o.reshape(B, T, H, K).astype(q_BTHK.dtype)


class _Head:
    """Reads and writes of one batch row and head; rows past the end are zeros."""

    def __init__(self, batch, head):
        self.batch, self.head = batch, head

    def read(self, ref, rows):
        at = ref.at[self.batch, rows[:, None], self.head, jnp.arange(ref.shape[3])[None, :]]
        return triton.load(at, mask=(rows < ref.shape[1])[:, None], other=0.0)

    def write(self, ref, rows, x):
        at = ref.at[self.batch, rows[:, None], self.head, jnp.arange(ref.shape[3])[None, :]]
        triton.store(at, x.astype(ref.dtype), mask=(rows < ref.shape[1])[:, None])

    def read_row(self, ref, rows, other):
        """Of [B,H,T]."""
        at = ref.at[self.batch, self.head, rows]
        return triton.load(at, mask=rows < ref.shape[2], other=other)


def _docs_of(ref, batch, rows, other):
    return triton.load(ref.at[batch, rows], mask=rows < ref.shape[1], other=other)


def _scores(q, k, rows, columns, offset, docs):
    """[queries,keys] times log2(e) / sqrt(K), masked. docs: (of rows, of columns) or None."""
    s = triton.dot(q, k, trans_b=True) * (math.log2(math.e) * q.shape[1] ** -0.5)
    seen = columns[None, :] <= rows[:, None] + offset
    if docs is not None:
        seen &= docs[0][:, None] == docs[1][None, :]
    return jnp.where(seen, s, MASKED)


def _pair(docs, batch, rows, columns):
    if not docs:
        return None
    return _docs_of(docs[0], batch, rows, -2), _docs_of(docs[1], batch, columns, -3)


def _forward_kernel(*refs, tiles, group):
    q_ref, k_ref, v_ref, *docs, o_ref, lse_ref = refs
    T, S, K = q_ref.shape[1], k_ref.shape[1], q_ref.shape[3]
    block, head, batch = (pl.program_id(i) for i in range(3))
    block = pl.num_programs(0) - 1 - block  # the longest first: none is left over at the end
    mine, shared = _Head(batch, head), _Head(batch, head // group)
    rows = block * tiles.queries + jnp.arange(tiles.queries)
    q = mine.read(q_ref, rows)

    def one(j, carry):
        top, total, sum_QK = carry
        columns = j * tiles.keys + jnp.arange(tiles.keys)
        pair = _pair(docs, batch, rows, columns)
        s = _scores(q, shared.read(k_ref, columns), rows, columns, S - T, pair)
        higher = jnp.maximum(top, s.max(1))
        p = jnp.where(s > MASKED / 2, jnp.exp2(s - higher[:, None]), 0.0)
        shrink = jnp.exp2(top - higher)
        v = shared.read(v_ref, columns)
        sum_QK = sum_QK * shrink[:, None] + triton.dot(p.astype(v.dtype), v)
        return higher, total * shrink + p.sum(1), sum_QK

    last = jnp.clip((block + 1) * tiles.queries + S - T, 0, S)  # keys that the last row sees
    start = (
        jnp.full((tiles.queries,), MASKED, jnp.float32),
        jnp.zeros((tiles.queries,), jnp.float32),
        jnp.zeros((tiles.queries, K), jnp.float32),
    )
    top, total, sum_QK = jax.lax.fori_loop(0, -(-last // tiles.keys), one, start)
    blind = total == 0
    mine.write(o_ref, rows, sum_QK / jnp.where(blind, 1.0, total)[:, None])
    lse = jnp.where(blind, EMPTY_ROW_LSE, top + jnp.log2(jnp.where(blind, 1.0, total)))
    triton.store(lse_ref.at[batch, head, rows], lse, mask=rows < T)


def _gradient_of_scores(q, k, v, do, lse, delta, rows, columns, offset, docs):
    """(p, ds), [queries,keys] in q.dtype; ds without its factor 1/sqrt(K)."""
    s = _scores(q, k, rows, columns, offset, docs)
    p = jnp.where(s > MASKED / 2, jnp.exp2(s - lse[:, None]), 0.0)
    dp = triton.dot(do, v, trans_b=True)
    return p.astype(q.dtype), (p * (dp - delta[:, None])).astype(q.dtype)


def _dkv_kernel(*refs, tiles, group):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *docs, dk_ref, dv_ref = refs
    T, S, K = q_ref.shape[1], k_ref.shape[1], q_ref.shape[3]
    block, shared_head, batch = (pl.program_id(i) for i in range(3))
    shared = _Head(batch, shared_head)
    columns = block * tiles.keys + jnp.arange(tiles.keys)
    k, v = shared.read(k_ref, columns), shared.read(v_ref, columns)
    first = jnp.maximum(block * tiles.keys - (S - T), 0) // tiles.queries  # that sees this block
    count = jnp.maximum(pl.cdiv(T, tiles.queries) - first, 0)

    def one(turn, carry):
        dk, dv = carry
        mine = _Head(batch, shared_head * group + turn // count)
        rows = (first + turn % count) * tiles.queries + jnp.arange(tiles.queries)
        q, do = mine.read(q_ref, rows), mine.read(do_ref, rows)
        lse, delta = (
            mine.read_row(lse_ref, rows, EMPTY_ROW_LSE),
            mine.read_row(delta_ref, rows, 0.0),
        )
        pair = _pair(docs, batch, rows, columns)
        p, ds = _gradient_of_scores(q, k, v, do, lse, delta, rows, columns, S - T, pair)
        return dk + triton.dot(ds, q, trans_a=True), dv + triton.dot(p, do, trans_a=True)

    zero = jnp.zeros((tiles.keys, K), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group * count, one, (zero, zero))
    shared.write(dk_ref, columns, dk * K**-0.5)
    shared.write(dv_ref, columns, dv)


def _dq_kernel(*refs, tiles, group):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *docs, dq_ref = refs
    T, S, K = q_ref.shape[1], k_ref.shape[1], q_ref.shape[3]
    block, head, batch = (pl.program_id(i) for i in range(3))
    block = pl.num_programs(0) - 1 - block
    mine, shared = _Head(batch, head), _Head(batch, head // group)
    rows = block * tiles.queries + jnp.arange(tiles.queries)
    q, do = mine.read(q_ref, rows), mine.read(do_ref, rows)
    lse = mine.read_row(lse_ref, rows, EMPTY_ROW_LSE)
    delta = mine.read_row(delta_ref, rows, 0.0)

    def one(j, dq):
        columns = j * tiles.keys + jnp.arange(tiles.keys)
        k, v = shared.read(k_ref, columns), shared.read(v_ref, columns)
        pair = _pair(docs, batch, rows, columns)
        _, ds = _gradient_of_scores(q, k, v, do, lse, delta, rows, columns, S - T, pair)
        return dq + triton.dot(ds, k)

    last = jnp.clip((block + 1) * tiles.queries + S - T, 0, S)
    zero = jnp.zeros((tiles.queries, K), jnp.float32)
    dq = jax.lax.fori_loop(0, -(-last // tiles.keys), one, zero)
    mine.write(dq_ref, rows, dq * K**-0.5)


def _call(kernel, name, tiles, grid, out_shape, group, interpret):
    return triton.call(
        functools.partial(kernel, tiles=tiles, group=group),
        name=f"flash_attention_{name}",
        grid=grid,
        out_shape=out_shape,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def flash_attention(q_BTHK, k_BSGK, v_BSGK, docs_BT, docs_BS, blocks, interpret=False):
    """flash_attention_reference, fused; call it inside shard_map, on one device's heads.

    Args:
        q_BTHK, k_BSGK, v_BSGK: bfloat16, float16 or float32; K a power of two from 16 on; H a
            multiple of G.
        docs_BT, docs_BS: int32 from 0 on, or both None.
        blocks: the tiles of the three kernels; the type of each selects the kernel's body.
        interpret: runs without a GPU, for tests.

    Returns:
        [B,T,H,K] in q.dtype, named "attention" for remat policies; the log-sum-exp is
        "attention_lse".
    """
    return _forward(q_BTHK, k_BSGK, v_BSGK, docs_BT, docs_BS, blocks, interpret)[0]


def _forward(q, k, v, docs_BT, docs_BS, blocks, interpret):
    B, T, H, _ = q.shape
    docs, tiles = () if docs_BT is None else (docs_BT, docs_BS), blocks.forward
    if body_of(tiles) == "mosaic":
        from pallas_kernels import flash_attention_mosaic  # it imports Mosaic, and this file

        o, lse = flash_attention_mosaic.forward(q, k, v, docs, tiles, interpret)
    else:
        grid = (pl.cdiv(T, tiles.queries), H, B)
        shapes = (triton.like(q), triton.like(q, jnp.float32, (B, H, T)))
        run = _call(_forward_kernel, "forward", tiles, grid, shapes, H // k.shape[2], interpret)
        o, lse = run(q, k, v, *docs)
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention_lse")
    return o, (q, k, v, docs, o, lse)


def _dkv(given, tiles, interpret):
    """(dk, dv) of (q, k, v, do, log-sum-exp, delta, documents of both or neither)."""
    if body_of(tiles) == "mosaic":
        from pallas_kernels import flash_attention_mosaic_backward  # as above

        return flash_attention_mosaic_backward.dkv(given, tiles, interpret)
    q, k, v = given[:3]
    (B, S, G, _), shapes = k.shape, (triton.like(k), triton.like(v))
    grid = (pl.cdiv(S, tiles.keys), G, B)
    return _call(_dkv_kernel, "dkv", tiles, grid, shapes, q.shape[2] // G, interpret)(*given)


def _dq(given, tiles, interpret):
    if body_of(tiles) == "mosaic":
        from pallas_kernels import flash_attention_mosaic_backward  # as above

        return flash_attention_mosaic_backward.dq(given, tiles, interpret)
    q, k = given[:2]
    B, T, H, _ = q.shape
    grid, group = (pl.cdiv(T, tiles.queries), H, B), H // k.shape[2]
    return _call(_dq_kernel, "dq", tiles, grid, triton.like(q), group, interpret)(*given)


def _backward(blocks, interpret, residuals, do):
    q, k, v, docs, o, lse = residuals
    delta_BHT = jnp.einsum("BTHK,BTHK->BHT", o, do, preferred_element_type=jnp.float32)
    given = (q, k, v, do, lse, delta_BHT, *docs)
    dk, dv = _dkv(given, blocks.dkv, interpret)
    return _dq(given, blocks.dq, interpret), dk, dv, None, None


flash_attention.defvjp(_forward, _backward)

"""Causal attention without a [T,S] matrix in memory: softmax block by block, recomputed backward.

The queries are the last T of S positions: query t sees keys up to t + S - T, of its own document
if documents are given, and with a window of W only the last W of these, from t + S - T - W + 1. H
query heads share G key/value heads. Sums are float32, in a fixed order.

Online softmax (the paper's m and l): for each query the kernel keeps m, the largest score so far,
l, the sum of exp(score - m), and the sum of exp(score - m) * value. When a block of keys raises m,
both sums are multiplied by exp(old m - new m), so at the end their quotient is the exact result.
The backward (flash_attention_backward.py) recomputes the probabilities as exp(score - L) from the
stored log-sum-exp L = m + log(l). The GPU has an instruction for exp2, not exp, so m and L are in
units of log2(e). Blocks of keys that need no mask are visited first (key_blocks.py).

Bound: compute, for T of about 1,000 or more. Causal FLOPs: forward 2*B*H*K*T*(2S-T+1), backward 3.5
times that (2 for dk and dv, 1.5 for dq, as both recompute the scores; the usual count is 2.5).
Forward moves the bytes of q, k, v and o, and 4*B*H*T bytes for the log-sum-exp.

Source: Dao 2023, https://arxiv.org/abs/2307.08691; base 2 softmax as in Triton's tutorial 06,
https://triton-lang.org/main/getting-started/tutorials/06-fused-attention.html
"""

import contextlib
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from pallas_kernels import flash_attention_backward, key_blocks, triton
from pallas_kernels.attention_arguments import (
    check_attention,
    check_attention_tiles,
    check_documents,
    check_positions,
    tiles_for_device,
)
from pallas_kernels.attention_mask import exponent_scale, sees_itself, visible_pairs
from pallas_kernels.call_flops import WINDOW_SCOPE
from pallas_kernels.tile_order import EMPTY_ROW_LSE, LOWEST, MASKED
from pallas_kernels.tiles import FlashAttentionTiles, body_of


def flash_attention_reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    docs_BT: jax.Array | None = None,
    docs_BS: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Reference implementation; materialises [B,G,H/G,T,S], with softmax in at least float32.

    A query that sees no key gives 0; one whose scores are all -inf gives nan. Returns [B,T,H,K] in
    q.dtype.

    Raises:
        ValueError: T > S, or one of docs_BT and docs_BS is given without the other.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    check_positions(T, S)
    check_documents(docs_BT, docs_BS)
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    s = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide) * K**-0.5
    key_S, last_T1 = jnp.arange(S), jnp.arange(T)[:, None] + S - T
    visible = (key_S <= last_T1) & (key_S > last_T1 - (window or S))
    visible = jnp.broadcast_to(visible, (B, 1, 1, T, S))
    if docs_BT is not None and docs_BS is not None:
        visible &= (docs_BT[:, :, None] == docs_BS[:, None, :])[:, None, None]
    p = jnp.where(visible, jax.nn.softmax(jnp.where(visible, s, -jnp.inf), -1), 0.0)
    o = jnp.einsum("BGRTS,BSGK->BTGRK", p.astype(v_BSGK.dtype), v_BSGK, preferred_element_type=wide)
    return o.reshape(B, T, H, K).astype(q_BTHK.dtype)


def _forward_kernel(*refs, tiles, group, window, interpret):
    q_ref, k_ref, v_ref, *docs, o_ref, lse_ref = refs
    T, S, K = q_ref.shape[1], k_ref.shape[1], q_ref.shape[3]
    sees_ref: Any = docs.pop() if docs else None
    block, head, batch = (pl.program_id(i) for i in range(3))
    block = pl.num_programs(0) - 1 - block  # the longest first, so that no long one starts last
    query_head, key_head = triton.Head(batch, head), triton.Head(batch, head // group)
    rows = block * tiles.queries + jnp.arange(tiles.queries)
    q = query_head.read(q_ref, rows)
    scale = exponent_scale(K)

    def add_block(j, carry, masked):
        m_Q, l_Q, sum_QK = carry
        columns = j * tiles.keys + jnp.arange(tiles.keys)
        s = triton.dot(q, key_head.read(k_ref, columns, inside=not masked), trans_b=True)
        if masked:
            mask = visible_pairs(batch, rows, columns, T, S, docs[:2], window)
            s = jnp.where(mask, s, MASKED / scale)  # exp2 multiplies it by scale
        # A GPU's maximum may drop nan, but p, and with it both sums, keeps it.
        m_new_Q = jnp.maximum(m_Q, jnp.max(s, 1) * scale)
        p = triton.exp2(s, scale, m_new_Q[:, None], interpret)
        rescale_Q = triton.exp2(m_Q, 1.0, m_new_Q, interpret)
        v = key_head.read(v_ref, columns, inside=not masked)
        sum_QK = sum_QK * rescale_Q[:, None] + triton.dot(p.astype(v.dtype), v)
        return m_new_Q, l_Q * rescale_Q + p.sum(1), sum_QK

    visits = key_blocks.causal_visits(block, tiles, T, S, window)
    if docs:
        visits = visits.within_documents(*(docs[2][batch, block, i] for i in range(2)))
    carry = (
        jnp.full((tiles.queries,), LOWEST, jnp.float32),
        jnp.zeros((tiles.queries,), jnp.float32),
        jnp.zeros((tiles.queries, K), jnp.float32),
    )
    m_Q, l_Q, sum_QK = visits.loop(add_block, carry)
    empty = jnp.zeros(l_Q.shape, jnp.bool)  # queries that see no key
    if sees_ref is not None:
        sees = triton.load(sees_ref.at[batch, rows], mask=rows < T, other=0)
        empty = (l_Q == 0) & (sees == 0)
    query_head.write(o_ref, rows, sum_QK / jnp.where(empty, 1.0, l_Q)[:, None])
    lse = jnp.where(empty, EMPTY_ROW_LSE, m_Q + jnp.log2(jnp.where(empty, 1.0, l_Q)))
    triton.store(lse_ref.at[batch, head, rows], lse, mask=rows < T)


def flash_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    docs_BT: jax.Array | None = None,
    docs_BS: jax.Array | None = None,
    blocks: FlashAttentionTiles | None = None,
    interpret: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Computes flash_attention_reference; call it inside shard_map, on one device's heads.

    shard_map needs check_vma=False, as for every Pallas call.

    Args:
        q_BTHK, k_BSGK, v_BSGK: bfloat16, float16 or float32; K is a power of two of at least 16,
            H a multiple of G, and T at most S.
        docs_BT, docs_BS: the document of each query and key, int32 >= 0, or both None.
        blocks: the tiles of the three kernels; the type of each selects the kernel's body. None:
            those that the trainer uses on the current device. Under jax.jit they must be static.
        interpret: runs without a GPU, for tests.
        window: how many of the keys up to its own position a query sees, at least 1; None: all.

    Returns:
        [B,T,H,K] in q.dtype, with first-order gradients. Its checkpoint_name, for remat policies,
        is "attention"; that of the log-sum-exp, which the backward needs, is "attention_lse".

    Raises:
        ValueError: an argument is not as described here, or the Mosaic body that the tiles select
            does not support it; or there is no GPU, and interpret is not set.
    """
    check_attention(q_BTHK, k_BSGK, v_BSGK, docs_BT, docs_BS, interpret, window)
    if blocks is None:
        blocks = tiles_for_device(q_BTHK, k_BSGK, docs_BT is not None, interpret, window)
    check_attention_tiles(blocks)
    return _attend(q_BTHK, k_BSGK, v_BSGK, docs_BT, docs_BS, blocks, interpret, window)


def _scope(window):
    """Names the window in the metadata of the kernels' calls, where call_flops.py reads it."""
    if window is None:
        return contextlib.nullcontext()
    return jax.named_scope(WINDOW_SCOPE.format(window))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, docs_BT, docs_BS, blocks, interpret, window):
    return _forward(q, k, v, docs_BT, docs_BS, blocks, interpret, window)[0]


def _forward(q, k, v, docs_BT, docs_BS, blocks, interpret, window):
    B, T, H, _ = q.shape
    docs, tiles = () if docs_BT is None else (docs_BT, docs_BS), blocks.forward
    if (body := body_of(tiles)) != "triton":
        # Imports Mosaic GPU, which not every JAX has.
        module = importlib.import_module(f"pallas_kernels.flash_attention_{body}")
        with _scope(window):
            o, lse = module.forward(q, k, v, docs, tiles, interpret, window)
        # Without the barrier XLA calls the kernel twice where a scan stores its results: once in a
        # fusion that writes them into the stacked array, and once for all other uses.
        o, lse = jax.lax.optimization_barrier((o, lse))
    else:
        grid = (pl.cdiv(T, tiles.queries), H, B)
        shapes = (triton.like(q), triton.like(q, jnp.float32, (B, H, T)))
        options = {"tiles": tiles, "group": H // k.shape[2], "window": window}
        kernel = triton.call(
            functools.partial(_forward_kernel, **options, interpret=interpret),
            name="flash_attention_forward",
            grid=grid,
            out_shape=shapes,
            warps=tiles.warps,
            stages=tiles.stages,
            interpret=interpret,
        )
        bounds = (key_blocks.document_bounds(*docs, tiles, window),) if docs else ()
        with _scope(window):
            o, lse = kernel(q, k, v, *docs, *bounds, *sees_itself(B, T, k.shape[1], docs))
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention_lse")
    return o, (q, k, v, docs, o, lse)


def _backward_bodies(tiles):
    """Returns the module with the functions dkv and dq of the body that the tiles select."""
    if body_of(tiles) != "mosaic":
        return flash_attention_backward
    from pallas_kernels import flash_attention_mosaic_backward

    return flash_attention_mosaic_backward


def _backward(blocks, interpret, window, residuals, do):
    q, k, v, docs, o, lse = residuals
    delta_BHT = jnp.einsum("BTHK,BTHK->BHT", o, do, preferred_element_type=jnp.float32)
    arguments = (q, k, v, do, lse, delta_BHT, *docs)
    with _scope(window):
        if body_of(blocks.dq) == "dq_product":
            triton_bodies = flash_attention_backward
            dk, dv, ds_BHST = triton_bodies.dkv(
                arguments, blocks.dkv, interpret, window, stores_ds=True
            )
            dq = triton_bodies.dq_product(arguments, ds_BHST, blocks.dq, interpret, window)
        elif getattr(blocks.dq, "variant", "") == "stored":
            from pallas_kernels import flash_attention_mosaic_stored as stored

            dq, dk, dv = stored.gradients(arguments, blocks, interpret, window)
        else:
            dk, dv = _backward_bodies(blocks.dkv).dkv(arguments, blocks.dkv, interpret, window)
            dq = _backward_bodies(blocks.dq).dq(arguments, blocks.dq, interpret, window)
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)

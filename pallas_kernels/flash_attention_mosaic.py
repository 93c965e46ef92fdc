"""The forward body of flash_attention for Hopper: warp groups take turns at the tensor core.

A program computes one block of queries, a part of it in each multiplying warp group. The copying
warp group loads blocks of keys and values. While one group computes the softmax of a block, another
issues its products: the scores of one block together with p v of the block before it.

The variant "folded" (tiles.py) keeps the maximum in units of scores, so that the scale and the
subtraction of the maximum are one FMA: an instruction less for each score. A group visits only the
blocks of keys that its own queries see, so that tiles of more queries compute no more scores.

Source: the alternation ("ping-pong") is FlashAttention-3's, Shah et al. 2024,
https://arxiv.org/abs/2407.08608
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import attention_steps, mosaic
from pallas_kernels.attention_mask import exponent_scale, sees_itself
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tile_order import EMPTY_ROW_LSE, LOWEST, MASKED
from pallas_kernels.tiles import MOSAIC_HEADS, MosaicAttentionTiles

PIPELINE = "k_smem", "v_smem", "k_full", "v_full", "k_free", "v_free"


def check_heads(K: int) -> None:
    """Raises ValueError if K is not in MOSAIC_HEADS."""
    if K not in MOSAIC_HEADS:
        raise ValueError(
            f"Mosaic's attention has heads of 64 or 128; got K={K}. Give the kernel tiles of its "
            "Triton body."
        )


def _copy(k_ref, v_ref, steps, tiles, k_smem, v_smem, k_full, v_full, k_free, v_free):
    plgpu.set_max_registers(mosaic.REGISTERS[tiles.groups][0], action="decrease")
    rows = lambda j: pl.ds((steps.first + j) * tiles.keys, tiles.keys)
    keys, values = lambda j: [(k_ref.at[rows(j)], k_smem)], lambda j: [(v_ref.at[rows(j)], v_smem)]
    streams = (keys, k_full, k_free), (values, v_full, v_free)
    mosaic.copy_steps(steps.count, tiles.stages, streams)


class _Mask:
    """Masks the scores of one warp group's queries.

    Args:
        last: the last key that the first query sees, counted from the first key of step 0.
        docs: (documents of the queries, function of a step that loads those of its keys) or None.
        window: how many of the keys up to its last a query sees, or None for all.
    """

    def __init__(self, shape, last, docs, window):
        self.shape, self.docs, self.window = shape, docs, window
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        self.last = row + last  # the last key that each query sees

    def apply(self, s, j):
        column = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=plgpu.Layout.WGMMA)
        column += j * self.shape[1]
        visible = column <= self.last
        if self.window is None:
            s = jnp.where(visible, s, MASKED)
            return s if self.docs is None else jnp.where(self._same_document(j), s, MASKED)
        visible &= column > self.last - self.window
        if self.docs is not None:
            visible &= self._same_document(j)
        # Three selects, one for each condition, spilled at K=128 (audit, ptxas 12.9.86).
        return jnp.where(visible, s, MASKED)

    def _same_document(self, j):
        query_docs, key_docs = self.docs[0], self.docs[1](j)
        query_docs = lax.broadcast_in_dim(query_docs, self.shape, [0])
        return query_docs == lax.broadcast_in_dim(key_docs, self.shape, [1])


def _softmax(s, acc, m_Q, l_Q, dtype, scale):
    """Adds one block of scores to the online softmax (see flash_attention.py).

    Args:
        scale: makes scores, and their maximum m, exponents of exp2; None if they are already.
    """
    widen = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])
    m_new_Q = jnp.maximum(m_Q, s.max(1))
    if scale is None:
        p, rescale_Q = jnp.exp2(s - widen(m_new_Q, s.shape)), jnp.exp2(m_Q - m_new_Q)
    else:  # the compiler contracts a product and a sum that have no other use
        p = jnp.exp2(s * scale - widen(m_new_Q * scale, s.shape))
        rescale_Q = jnp.exp2((m_Q - m_new_Q) * scale)
    return acc * widen(rescale_Q, acc.shape), m_new_Q, l_Q * rescale_Q + p.sum(1), p.astype(dtype)


def _kernel(
    q_ref, k_ref, v_ref, *refs, tiles, ratio, window, q_smem, q_full, turn, p_smem=None, **pipeline
):
    *docs, o_ref, lse_ref = refs
    T, S = q_ref.shape[1], k_ref.shape[1]
    sees_ref: Any = docs.pop() if docs else None
    part = tiles.queries // tiles.groups
    group, head, key_head, batch, start, steps = attention_steps.find_query_block(
        T, S, tiles, ratio, window
    )

    @pl.when(group == tiles.groups)
    def _copy_keys_and_values():
        _copy(k_ref.at[batch, :, key_head], v_ref.at[batch, :, key_head], steps, tiles, **pipeline)

    @pl.when(group < tiles.groups)
    def _attend_and_write():
        plgpu.set_max_registers(mosaic.REGISTERS[tiles.groups][1], action="increase")
        first_row = start + group * part
        rows = pl.ds(first_row, part)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem.at[group], q_full.at[group])
        pair = None
        if docs:
            load = lambda ref, index, dim: plgpu.load(
                ref.at[batch, index], layout=plgpu.Layout.WGMMA.reduce(dim), optimized=False
            )
            keys = lambda j: pl.ds((steps.first + j) * tiles.keys, tiles.keys)
            load_key_docs = lambda j: load(docs[1], keys(j), 0)
            pair = load(docs[0], rows, 1), load_key_docs
        last = first_row + (S - T) - steps.first * tiles.keys
        mask = _Mask((part, tiles.keys), last, pair, window)
        own = steps
        if tiles.variant == "folded":
            own = attention_steps.own_steps(steps, first_row, part, tiles, T, S, window)
        plgpu.barrier_wait(q_full.at[group])
        q = q_smem.at[group]
        staging = None if p_smem is None else p_smem.at[group]
        acc, m_Q, l_Q = _attend(q, own, steps.count, mask, tiles, group, turn, staging, **pipeline)
        empty = None
        if sees_ref is not None:  # some queries may see no key
            empty = (l_Q == 0) & (mosaic.load_along_rows(sees_ref.at[batch, rows]) == 0)
            l_Q = jnp.where(empty, 1.0, l_Q)
        # The output is written through the queries' shared memory, which is no longer needed.
        q[...] = (acc / lax.broadcast_in_dim(l_Q, acc.shape, [0])).astype(o_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, o_ref.at[batch, rows, head])
        if tiles.variant == "folded":
            m_Q *= exponent_scale(q.shape[1])
        lse = m_Q + jnp.log(l_Q) * math.log2(math.e)
        lse_ref[batch, head, rows] = lse if empty is None else jnp.where(empty, EMPTY_ROW_LSE, lse)
        plgpu.wait_smem_to_gmem(0)


def _loops(steps, mask):
    """Returns (first step, end, whether it has a mask) of the loops after step 0, which has one."""
    if mask.docs is not None:
        return [(1, steps.count, True)]
    masked = jnp.clip(steps.masked, 1, steps.count)
    if mask.window is None:
        return [(1, masked, False), (masked, steps.count, True)]
    clear = jnp.clip(steps.clear, 1, masked)
    return [(1, clear, True), (clear, masked, False), (masked, steps.count, True)]


def _attend(q, steps, all_steps, mask, tiles, group, turn, p_smem, **pipeline):
    """Returns (sum of p v, m, l) of a group's queries over its steps, in units of _softmax.

    The barrier `turn` has one slot for each group. A group waits for its own slot before it issues
    products, and then arrives at the next group's slot, so that they take turns.

    Args:
        all_steps: how many steps the program has, if the group must skip the last ones.
    """
    k_smem, v_smem, k_full, v_full, k_free, v_free = (pipeline[name] for name in PIPELINE)
    part, K = q.shape
    folded, scale = tiles.variant == "folded", exponent_scale(K)
    next_group = lax.rem(group + 1, tiles.groups)
    slot_of = lambda j: lax.rem(j, tiles.stages)
    zeros = lambda width: plgpu.layout_cast(
        jnp.zeros((part, width), jnp.float32), plgpu.Layout.WGMMA
    )
    row = lambda x: plgpu.layout_cast(
        jnp.full((part,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
    )

    def scores(j, last=None):
        """Returns the scores of step j and, given (acc, p) of the step before, acc + p v."""
        slot, last_slot = slot_of(j), slot_of(j - 1)
        plgpu.barrier_wait(k_full.at[slot])
        if last:
            plgpu.barrier_wait(v_full.at[last_slot])
        plgpu.barrier_wait(turn.at[group])

        def products(s_ref, acc_ref=None):
            plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
            if last:
                mosaic.multiply_registers(acc_ref, last[1], v_smem.at[last_slot], p_smem)
            plgpu.barrier_arrive(turn.at[next_group])

        start = [zeros(tiles.keys)] + ([last[0]] if last else [])
        s, *acc = mosaic.accumulate(products, start, p_smem is not None)
        plgpu.barrier_arrive(k_free.at[slot])
        if last:
            plgpu.barrier_arrive(v_free.at[last_slot])
        return s if folded else s * scale, *acc

    def add_softmax(s, acc, m_Q, l_Q):
        return _softmax(s, acc, m_Q, l_Q, q.dtype, scale if folded else None)

    def step(j, carry, masked):
        acc, m_Q, l_Q, p = carry
        s, acc = scores(j, (acc, p))
        return add_softmax(mask.apply(s, j) if masked else s, acc, m_Q, l_Q)

    def skip_step(j):
        slot = slot_of(j)
        plgpu.barrier_wait(k_full.at[slot])
        plgpu.barrier_wait(turn.at[group])
        plgpu.barrier_arrive(turn.at[next_group])
        plgpu.barrier_arrive(k_free.at[slot])
        plgpu.barrier_wait(v_full.at[slot])
        plgpu.barrier_arrive(v_free.at[slot])

    first_turn = lambda: plgpu.barrier_arrive(turn.at[0])  # group 0 begins
    pl.when(group == tiles.groups - 1)(first_turn)
    (s,) = scores(0)
    carry = add_softmax(mask.apply(s, 0), zeros(K), row(LOWEST), row(0.0))
    for first, end, masked in _loops(steps, mask):
        carry = lax.fori_loop(first, end, functools.partial(step, masked=masked), carry)
    acc, m_Q, l_Q, p = carry
    # When a program ends, every arrival must have been waited for; this is the last group's.
    last_turn = lambda: plgpu.barrier_wait(turn.at[0])
    if not folded:
        pl.when(group == 0)(last_turn)
    slot = slot_of(steps.count - 1)
    plgpu.barrier_wait(v_full.at[slot])
    values = lambda acc_ref: mosaic.multiply_registers(acc_ref, p, v_smem.at[slot], p_smem)
    (acc,) = mosaic.accumulate(values, [acc], p_smem is not None)
    plgpu.barrier_arrive(v_free.at[slot])
    if folded:
        pl.loop(steps.count, all_steps)(skip_step)
        pl.when(group == 0)(last_turn)
    return acc, m_Q, l_Q


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    docs: Sequence[jax.Array],
    tiles: MosaicAttentionTiles,
    interpret: bool,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHK, lse_BHT) as flash_attention's forward kernel does.

    Args:
        docs: (docs_BT, docs_BS) or ().
        tiles: queries must be a multiple of 64 for each group, keys of 64.

    Raises:
        ValueError: mosaic.check or mosaic.check_rows refuses the arrays, or K is not in
            MOSAIC_HEADS.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    mosaic.check(q=q_BTHK, k=k_BSGK, v=v_BSGK)
    mosaic.check_rows(T=T, S=S)
    check_heads(K)
    blocks = pl.cdiv(T, tiles.queries)
    padded = jax.ShapeDtypeStruct((B, H, blocks * tiles.queries), jnp.float32)
    sees = [mosaic.pad_last(x, tiles.queries, 0) for x in sees_itself(B, T, S, docs)]
    docs = [mosaic.pad_last(x, n, -1) for x, n in zip(docs, tiles[:2], strict=False)]
    memory = functools.partial(mosaic.swizzled_shared_memory, dtype=q_BTHK.dtype)
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.stages)
    groups, part = tiles.groups, tiles.queries // tiles.groups
    scratch = {
        "q_smem": memory((groups, part, K)),
        "q_full": plgpu.Barrier(num_barriers=groups),
        "turn": plgpu.Barrier(num_barriers=groups),
    }
    scratch |= {f"{name}_smem": memory((tiles.stages, tiles.keys, K)) for name in "kv"}
    scratch |= {f"{name}_full": barriers(1) for name in "kv"}
    scratch |= {f"{name}_free": barriers(groups) for name in "kv"}
    if interpret:  # see mosaic.multiply_registers
        scratch["p_smem"] = memory((groups, part, tiles.keys))
    o, lse = mosaic.call(
        functools.partial(_kernel, tiles=tiles, ratio=H // G, window=window),
        name="flash_attention_forward",
        grid={"head": H, "block": blocks, "batch": B},
        out_shape=[jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype), padded],
        scratch=scratch,
        consumers=groups,
        approximate=True,
        interpret=interpret,
    )(q_BTHK, k_BSGK, v_BSGK, *docs, *sees)
    return o, lse[:, :, :T]

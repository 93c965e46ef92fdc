"""The forward body of flash_attention for Hopper: two warp groups take turns at the tensor core.

A program computes one block of queries, half of it in each multiplying warp group. The copying warp
group loads blocks of keys and values. While one group computes the softmax of a block, the other
issues its products: the scores of one block together with p v of the block before it.

Source: the alternation ("ping-pong") is FlashAttention-3's, Shah et al. 2024,
https://arxiv.org/abs/2407.08608
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import attention_steps, mosaic
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


class QueryBlock(NamedTuple):
    """The position of a program's block of queries, in traced numbers."""

    group: Any  # the index of this warp group
    head: Any
    key_head: Any
    batch: Any
    start: Any  # its first query
    steps: attention_steps.Steps  # the blocks of keys that it sees


def find_query_block(
    T: int, S: int, tiles: MosaicAttentionTiles, ratio: int, window: int | None
) -> QueryBlock:
    """Returns the block of this program; `ratio` query heads share a key head."""
    group, head, batch = (lax.axis_index(name) for name in ("group", "head", "batch"))
    # The longest blocks first, so that no long one starts last.
    block = lax.axis_size("block") - 1 - lax.axis_index("block")
    start = block * tiles.queries
    steps = attention_steps.key_steps(start, tiles, T, S, window)
    return QueryBlock(group, head, lax.div(head, ratio), batch, start, steps)


def _copy(k_ref, v_ref, steps, tiles, k_smem, v_smem, k_full, v_full, k_free, v_free):
    plgpu.set_max_registers(mosaic.COPYING_REGISTERS, action="decrease")
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
        keys = self.shape[1]
        column = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=plgpu.Layout.WGMMA)
        s = jnp.where(column + j * keys <= self.last, s, MASKED)
        if self.window is not None:
            s = jnp.where(column + (j * keys + self.window) > self.last, s, MASKED)
        if self.docs is not None:
            query_docs, key_docs = self.docs[0], self.docs[1](j)
            query_docs = lax.broadcast_in_dim(query_docs, self.shape, [0])
            key_docs = lax.broadcast_in_dim(key_docs, self.shape, [1])
            s = jnp.where(query_docs == key_docs, s, MASKED)
        return s


def _softmax(s, acc, m_Q, l_Q, dtype):
    """Adds one block of scores to the online softmax (see flash_attention.py), in units of log2."""
    widen = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])
    m_new_Q = jnp.maximum(m_Q, s.max(1))
    p = jnp.exp2(s - widen(m_new_Q, s.shape))
    rescale_Q = jnp.exp2(m_Q - m_new_Q)
    return acc * widen(rescale_Q, acc.shape), m_new_Q, l_Q * rescale_Q + p.sum(1), p.astype(dtype)


def _kernel(
    q_ref, k_ref, v_ref, *refs, tiles, ratio, window, q_smem, q_full, turn, p_smem=None, **pipeline
):
    *docs, o_ref, lse_ref = refs
    T, S = q_ref.shape[1], k_ref.shape[1]
    half = tiles.queries // mosaic.CONSUMERS
    group, head, key_head, batch, start, steps = find_query_block(T, S, tiles, ratio, window)

    @pl.when(group == mosaic.CONSUMERS)
    def _copy_keys_and_values():
        _copy(k_ref.at[batch, :, key_head], v_ref.at[batch, :, key_head], steps, tiles, **pipeline)

    @pl.when(group < mosaic.CONSUMERS)
    def _attend_and_write():
        plgpu.set_max_registers(mosaic.MULTIPLYING_REGISTERS, action="increase")
        rows = pl.ds(start + group * half, half)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem.at[group], q_full.at[group])
        pair = None
        if docs:
            load = lambda ref, index, dim: plgpu.load(
                ref.at[batch, index], layout=plgpu.Layout.WGMMA.reduce(dim), optimized=False
            )
            keys = lambda j: pl.ds((steps.first + j) * tiles.keys, tiles.keys)
            load_key_docs = lambda j: load(docs[1], keys(j), 0)
            pair = load(docs[0], rows, 1), load_key_docs
        last = start + group * half + (S - T) - steps.first * tiles.keys
        mask = _Mask((half, tiles.keys), last, pair, window)
        plgpu.barrier_wait(q_full.at[group])
        q = q_smem.at[group]
        staging = None if p_smem is None else p_smem.at[group]
        acc, m_Q, l_Q = _attend(q, steps, mask, tiles, group, turn, staging, **pipeline)
        empty = l_Q == 0  # queries that see no key
        l_Q = jnp.where(empty, 1.0, l_Q)
        # The output is written through the queries' shared memory, which is no longer needed.
        q[...] = (acc / lax.broadcast_in_dim(l_Q, acc.shape, [0])).astype(o_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, o_ref.at[batch, rows, head])
        lse = m_Q + jnp.log(l_Q) * math.log2(math.e)
        lse_ref[batch, head, rows] = jnp.where(empty, EMPTY_ROW_LSE, lse)
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


def _attend(q, steps, mask, tiles, group, turn, p_smem, **pipeline):
    """Returns (sum of p v, m, l) of a group's queries over all steps.

    The barrier `turn` has one slot for each group. A group waits for its own slot before it issues
    products, and then arrives at the other group's slot, so that the two alternate.
    """
    k_smem, v_smem, k_full, v_full, k_free, v_free = (pipeline[name] for name in PIPELINE)
    half, K = q.shape
    scale = math.log2(math.e) * K**-0.5
    slot_of = lambda j: lax.rem(j, tiles.stages)
    zeros = lambda width: plgpu.layout_cast(
        jnp.zeros((half, width), jnp.float32), plgpu.Layout.WGMMA
    )
    row = lambda x: plgpu.layout_cast(
        jnp.full((half,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
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
            plgpu.barrier_arrive(turn.at[1 - group])

        start = [zeros(tiles.keys)] + ([last[0]] if last else [])
        s, *acc = mosaic.accumulate(products, start, p_smem is not None)
        plgpu.barrier_arrive(k_free.at[slot])
        if last:
            plgpu.barrier_arrive(v_free.at[last_slot])
        return s * scale, *acc

    def step(j, carry, masked):
        acc, m_Q, l_Q, p = carry
        s, acc = scores(j, (acc, p))
        return _softmax(mask.apply(s, j) if masked else s, acc, m_Q, l_Q, q.dtype)

    pl.when(group == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))  # group 0 begins
    (s,) = scores(0)
    carry = _softmax(mask.apply(s, 0), zeros(K), row(LOWEST), row(0.0), q.dtype)
    for first, end, masked in _loops(steps, mask):
        carry = lax.fori_loop(first, end, functools.partial(step, masked=masked), carry)
    acc, m_Q, l_Q, p = carry
    # When a program ends, every arrival must have been waited for; this is group 1's last one.
    pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
    slot = slot_of(steps.count - 1)
    plgpu.barrier_wait(v_full.at[slot])
    values = lambda acc_ref: mosaic.multiply_registers(acc_ref, p, v_smem.at[slot], p_smem)
    (acc,) = mosaic.accumulate(values, [acc], p_smem is not None)
    plgpu.barrier_arrive(v_free.at[slot])
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
        tiles: queries must be a multiple of 128, keys of 64.

    Raises:
        ValueError: mosaic.check refuses the arrays, or K is not in MOSAIC_HEADS.
    """
    (B, T, H, K), G = q_BTHK.shape, k_BSGK.shape[2]
    mosaic.check(q=q_BTHK, k=k_BSGK, v=v_BSGK)
    check_heads(K)
    blocks = pl.cdiv(T, tiles.queries)
    padded = jax.ShapeDtypeStruct((B, H, blocks * tiles.queries), jnp.float32)
    docs = [mosaic.pad_last(x, n, -1) for x, n in zip(docs, tiles[:2], strict=False)]
    memory = functools.partial(mosaic.swizzled_shared_memory, dtype=q_BTHK.dtype)
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.stages)
    half = tiles.queries // mosaic.CONSUMERS
    scratch = {
        "q_smem": memory((mosaic.CONSUMERS, half, K)),
        "q_full": plgpu.Barrier(num_barriers=mosaic.CONSUMERS),
        "turn": plgpu.Barrier(num_barriers=mosaic.CONSUMERS),
    }
    scratch |= {f"{name}_smem": memory((tiles.stages, tiles.keys, K)) for name in "kv"}
    scratch |= {f"{name}_full": barriers(1) for name in "kv"}
    scratch |= {f"{name}_free": barriers(mosaic.CONSUMERS) for name in "kv"}
    if interpret:  # see mosaic.multiply_registers
        scratch["p_smem"] = memory((mosaic.CONSUMERS, half, tiles.keys))
    o, lse = mosaic.call(
        functools.partial(_kernel, tiles=tiles, ratio=H // G, window=window),
        name="flash_attention_forward",
        grid={"head": H, "block": blocks, "batch": B},
        out_shape=[jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype), padded],
        scratch=scratch,
        approximate=True,
        interpret=interpret,
    )(q_BTHK, k_BSGK, v_BSGK, *docs)
    return o, lse[:, :, :T]

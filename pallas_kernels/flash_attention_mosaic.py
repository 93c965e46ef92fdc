"""flash_attention's forward body for Hopper: two warp groups take turns at the tensor core.

A program has one block of queries, half of it in each multiplying warp group; the copying one
brings keys and values. While a group takes the softmax of a block, the other multiplies: its
scores of one block and the values of the block before, issued together.

Source: the turns are FlashAttention-3's, Shah et al. 2024, https://arxiv.org/abs/2407.08608
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tile_order import EMPTY_ROW_LSE, MASKED

WIDTHS = (64, 128)
PIPELINE = "k_smem", "v_smem", "k_full", "v_full", "k_free", "v_free"
LOWEST = MASKED / 10  # where a row's largest score starts: above what is masked, which exp2 makes 0


def check_heads(K) -> None:
    """Raises ValueError where K is not of WIDTHS."""
    if K not in WIDTHS:
        raise ValueError(
            f"Mosaic's attention has heads of 64 or 128; got K={K}. Give the kernel tiles of "
            "Triton's body."
        )


class Place(NamedTuple):
    """A program that has one block of queries."""

    group: object  # this warp group
    head: object
    shared: object  # the head of keys and values
    batch: object
    start: object  # its first query
    steps: object  # blocks of keys that its last query sees


def place_of(T, S, tiles, ratio) -> Place:
    """Of grid axes head, block and batch; ratio: query heads to a head of keys and values."""
    group, head, batch = (lax.axis_index(name) for name in ("group", "head", "batch"))
    block = lax.axis_size("block") - 1 - lax.axis_index("block")  # the longest first
    start = block * tiles.queries
    last = jnp.clip(start + tiles.queries + S - T, 1, S)  # keys that the last row sees
    steps = lax.div(last + tiles.keys - 1, tiles.keys)
    return Place(group, head, lax.div(head, ratio), batch, start, steps)


def _copy(k_ref, v_ref, steps, tiles, k_smem, v_smem, k_full, v_full, k_free, v_free):
    plgpu.set_max_registers(mosaic.COPYING_REGISTERS, action="decrease")
    rows = lambda j: pl.ds(j * tiles.keys, tiles.keys)
    keys, values = lambda j: [(k_ref.at[rows(j)], k_smem)], lambda j: [(v_ref.at[rows(j)], v_smem)]
    streams = (keys, k_full, k_free), (values, v_full, v_free)
    mosaic.copy_steps(steps, tiles.stages, streams)


class _Rows:
    """One warp group's queries: which keys they see."""

    def __init__(self, shape, first, offset, docs):
        """docs: (of the rows, [keys] of a step) or None."""
        self.shape, self.docs = shape, docs
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        self.last = row + (first + offset)

    def masked(self, s, j):
        keys = self.shape[1]
        column = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=plgpu.Layout.WGMMA)
        s = jnp.where(column + j * keys <= self.last, s, MASKED)
        if self.docs is not None:
            mine, theirs = self.docs[0], self.docs[1](j)
            mine = lax.broadcast_in_dim(mine, self.shape, [0])
            s = jnp.where(mine == lax.broadcast_in_dim(theirs, self.shape, [1]), s, MASKED)
        return s


def _softmax(s, acc, top, total, dtype):
    """The running softmax with one more block of scores, in units of log2: (acc, top, total, p)."""
    wide = lambda x, shape: lax.broadcast_in_dim(x, shape, [0])
    higher = jnp.maximum(top, s.max(1))
    p = jnp.exp2(s - wide(higher, s.shape))
    shrink = jnp.exp2(top - higher)
    return acc * wide(shrink, acc.shape), higher, total * shrink + p.sum(1), p.astype(dtype)


def _kernel(
    q_ref, k_ref, v_ref, *refs, tiles, ratio, q_smem, q_full, turn, p_smem=None, **pipeline
):
    *docs, o_ref, lse_ref = refs
    T, S = q_ref.shape[1], k_ref.shape[1]
    half = tiles.queries // mosaic.CONSUMERS
    group, head, shared, batch, start, steps = place_of(T, S, tiles, ratio)

    @pl.when(group == mosaic.CONSUMERS)
    def _():
        _copy(k_ref.at[batch, :, shared], v_ref.at[batch, :, shared], steps, tiles, **pipeline)

    @pl.when(group < mosaic.CONSUMERS)
    def _():
        plgpu.set_max_registers(mosaic.MULTIPLYING_REGISTERS, action="increase")
        rows = pl.ds(start + group * half, half)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem.at[group], q_full.at[group])
        pair = None
        if docs:
            load = lambda ref, at, dim: plgpu.load(
                ref.at[batch, at], layout=plgpu.Layout.WGMMA.reduce(dim), optimized=False
            )
            of_keys = lambda j: load(docs[1], pl.ds(j * tiles.keys, tiles.keys), 0)
            pair = load(docs[0], rows, 1), of_keys
        mask = _Rows((half, tiles.keys), start + group * half, S - T, pair)
        free_of_masks = 1 if docs else jnp.clip(lax.div(start + S - T + 1, tiles.keys), 1, steps)
        plgpu.barrier_wait(q_full.at[group])
        q = q_smem.at[group]
        staging = None if p_smem is None else p_smem.at[group]
        acc, top, total = _attend(
            q, steps, free_of_masks, mask, tiles, group, turn, staging, **pipeline
        )
        blind = total == 0
        total = jnp.where(blind, 1.0, total)
        q[...] = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(o_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, o_ref.at[batch, rows, head])
        lse = top + jnp.log(total) * math.log2(math.e)
        lse_ref[batch, head, rows] = jnp.where(blind, EMPTY_ROW_LSE, lse)
        plgpu.wait_smem_to_gmem(0)


def _attend(q, steps, free_of_masks, mask, tiles, group, turn, p_smem, **pipeline):
    """(sum of values, largest score, sum of exponentials) of a group's queries over all steps."""
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

    def scores(j, also=None):
        """Of step j, beside the values of the step before; (acc, p) is theirs."""
        slot, before = slot_of(j), slot_of(j - 1)
        plgpu.barrier_wait(k_full.at[slot])
        if also:
            plgpu.barrier_wait(v_full.at[before])
        plgpu.barrier_wait(turn.at[group])

        def products(s_ref, acc_ref=None):
            plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
            if also:
                mosaic.multiply_registers(acc_ref, also[1], v_smem.at[before], p_smem)
            plgpu.barrier_arrive(turn.at[1 - group])

        start = [zeros(tiles.keys)] + ([also[0]] if also else [])
        s, *acc = mosaic.accumulate(products, start, p_smem is not None)
        plgpu.barrier_arrive(k_free.at[slot])
        if also:
            plgpu.barrier_arrive(v_free.at[before])
        return s * scale, *acc

    def one(j, carry, masked):
        acc, top, total, p = carry
        s, acc = scores(j, (acc, p))
        return _softmax(mask.masked(s, j) if masked else s, acc, top, total, q.dtype)

    pl.when(group == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
    (s,) = scores(0)
    carry = _softmax(mask.masked(s, 0), zeros(K), row(LOWEST), row(0.0), q.dtype)
    carry = lax.fori_loop(1, free_of_masks, functools.partial(one, masked=False), carry)
    carry = lax.fori_loop(free_of_masks, steps, functools.partial(one, masked=True), carry)
    acc, top, total, p = carry
    pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))  # group 1's last gift of it
    slot = slot_of(steps - 1)
    plgpu.barrier_wait(v_full.at[slot])
    values = lambda acc_ref: mosaic.multiply_registers(acc_ref, p, v_smem.at[slot], p_smem)
    (acc,) = mosaic.accumulate(values, [acc], p_smem is not None)
    plgpu.barrier_arrive(v_free.at[slot])
    return acc, top, total


def forward(q_BTHK, k_BSGK, v_BSGK, docs, tiles, interpret):
    """(o_BTHK, lse_BHT) as flash_attention's forward kernel.

    Args:
        docs: (docs_BT, docs_BS) or ().
        tiles: a MosaicAttentionTiles; queries a multiple of 128, keys of 64.

    Raises:
        ValueError: as mosaic.check; K is not of WIDTHS.
    """
    (B, T, H, K), G = q_BTHK.shape, k_BSGK.shape[2]
    mosaic.check(q=q_BTHK, k=k_BSGK, v=v_BSGK)
    check_heads(K)
    blocks = pl.cdiv(T, tiles.queries)
    padded = jax.ShapeDtypeStruct((B, H, blocks * tiles.queries), jnp.float32)
    docs = [
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=-1)
        for x, size in zip(docs, (tiles.queries, tiles.keys), strict=False)
    ]
    memory = functools.partial(mosaic.shared, dtype=q_BTHK.dtype)
    barriers = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiles.stages)
    scratch = {
        "q_smem": memory((mosaic.CONSUMERS, tiles.queries // mosaic.CONSUMERS, K)),
        "q_full": plgpu.Barrier(num_barriers=mosaic.CONSUMERS),
        "turn": plgpu.Barrier(num_barriers=mosaic.CONSUMERS),
    }
    scratch |= {f"{name}_smem": memory((tiles.stages, tiles.keys, K)) for name in "kv"}
    scratch |= {f"{name}_full": barriers(1) for name in "kv"}
    scratch |= {f"{name}_free": barriers(mosaic.CONSUMERS) for name in "kv"}
    if interpret:  # see mosaic.multiply_registers
        half = tiles.queries // mosaic.CONSUMERS
        scratch["p_smem"] = memory((mosaic.CONSUMERS, half, tiles.keys))
    o, lse = mosaic.call(
        functools.partial(_kernel, tiles=tiles, ratio=H // G),
        name="flash_attention_forward",
        grid={"head": H, "block": blocks, "batch": B},
        out_shape=[jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype), padded],
        scratch=scratch,
        approximate=True,
        interpret=interpret,
    )(q_BTHK, k_BSGK, v_BSGK, *docs)
    return o, lse[:, :, :T]

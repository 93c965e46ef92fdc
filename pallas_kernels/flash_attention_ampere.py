"""The forward body of flash_attention for Ampere and Ada.

A program computes one block of queries, which stay in registers. Blocks of keys and of values pass
through the same slots of shared memory in turn, so that two programs fit on a multiprocessor: one
multiplies while the other computes exponentials.

Source: 64 queries and 64 keys with two programs on a multiprocessor are FlashAttention-2's choice
for causal attention on sm_86 (csrc/flash_attn/src/flash_fwd_launch_template.h, flash-attn 2.7)
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import ampere, key_blocks, mosaic
from pallas_kernels.attention_mask import sees_itself
from pallas_kernels.flash_attention_mosaic import check_heads
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tile_order import EMPTY_ROW_LSE, LOWEST, MASKED
from pallas_kernels.tiles import AmpereAttentionTiles

WARPS_ALONG_ROWS = 4  # of four: each warp has entire rows of scores, and sums them by itself
COLUMNS = 64  # of shared memory that one load reads: the width of its swizzle
KEYS_AT_ONCE = 16  # that one load reads; more take registers before the products need them


class _Order:
    """The order of a program's steps: first the blocks of keys that need no mask."""

    def __init__(self, visits):
        self.visits = visits
        self.unmasked = visits.diagonal - visits.clear
        self.count = self.unmasked + visits.masked_count

    def block(self, step):
        """Returns the step's block of keys: from `clear` to `end`, then from `first` on."""
        to_end = self.visits.end - self.visits.clear
        return step + jnp.where(step < to_end, self.visits.clear, self.visits.first - to_end)


def _parts(length, size):
    return [pl.ds(start, size) for start in range(0, length, size)]


class _Products:
    """The two products of a step, of queries in registers and of slots in shared memory."""

    def __init__(self, q, layouts, slots_smem, interpret):
        self.q, self.layouts, self.smem, self.interpret = q, layouts, slots_smem, interpret

    def scores(self, slot):
        queries, (keys, K) = self.q[0].shape[0], self.smem.shape[1:]
        zero = plgpu.layout_cast(jnp.zeros((queries, KEYS_AT_ONCE), jnp.float32), self.layouts.sum)
        columns = []
        for rows in _parts(keys, KEYS_AT_ONCE):
            s = zero
            for q, part in zip(self.q, _parts(K, COLUMNS), strict=True):
                k = plgpu.load(self.smem.at[slot, rows, part].T, layout=self.layouts.y)
                s = ampere.multiply(s, q, k, self.interpret)
            columns.append(s)
        return lax.concatenate(columns, 1)

    def add_values(self, sum_QK, p, slot):
        """Returns sum_QK + p v, where p has the layout of a sum."""
        p = ampere.as_operand(p, self.layouts, self.interpret)
        keys, K = self.smem.shape[1:]
        columns = []
        for part in _parts(K, COLUMNS):
            x = sum_QK[:, part.start : part.start + COLUMNS]
            for rows in _parts(keys, KEYS_AT_ONCE):
                v = plgpu.load(self.smem.at[slot, rows, part], layout=self.layouts.y)
                x = ampere.multiply(
                    x, p[:, rows.start : rows.start + KEYS_AT_ONCE], v, self.interpret
                )
            columns.append(x)
        return lax.concatenate(columns, 1)


def _visible(shape, layouts, last, docs, window):
    """Returns where a query sees a key: not after it, in its window, and of its document.

    Args:
        last: the last key that the first row sees, counted from the first column.
        docs: (documents of the rows, documents of the columns), refs, or ().
        window: how many of the keys up to its last a query sees, or None for all.
    """
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=layouts.sum) for dim in (0, 1)
    )
    visible = column <= row + last
    if window is not None:
        visible &= column > row + (last - window)
    if docs:
        rows, columns = (
            plgpu.load(ref, layout=layout, optimized=False)
            for ref, layout in zip(docs, (layouts.row, layouts.column), strict=True)
        )
        along = lambda x, dim: lax.broadcast_in_dim(x, shape, [dim])
        visible &= along(rows, 0) == along(columns, 1)
    return visible


def _kernel(q_ref, k_ref, v_ref, *refs, tiles, sizes, window, interpret, shared):
    *docs, o_ref, lse_ref = refs
    sees_ref: Any = docs.pop() if docs else None
    (q_smem,), (slots_smem,) = shared
    (T, S, ratio, K), layouts = sizes, ampere.Layouts(q_ref.dtype, WARPS_ALONG_ROWS)
    head, batch = (lax.axis_index(name) for name in ("head", "batch"))
    # The longest blocks first, so that no long one starts last.
    block = lax.axis_size("block") - 1 - lax.axis_index("block")
    rows = pl.ds(block * tiles.queries, tiles.queries)
    here = batch, rows, pl.ds(head * K, K)  # heads lie side by side in the last dimension
    ampere.copy_now(q_ref.at[here], q_smem, interpret)
    q = [plgpu.load(q_smem.at[:, part], layout=layouts.x) for part in _parts(K, COLUMNS)]
    ampere.barrier(interpret)  # the slots lie where the queries were
    visits = key_blocks.causal_visits(block, tiles, T, S, window)
    if docs:
        visits = visits.within_documents(*(docs[2][batch, block, i] for i in range(2)))
    order, key_columns = _Order(visits), pl.ds(lax.div(head, ratio) * K, K)

    def stream(ref):
        keys = lambda step: pl.ds(order.block(step) * tiles.keys, tiles.keys)
        return lambda step, slot: [(ref.at[batch, keys(step), key_columns], slots_smem.at[slot])]

    streams = [stream(k_ref), stream(v_ref)]
    ring = ampere.Ring(tiles.stages, order.count, streams, copies=1, interpret=interpret)
    products = _Products(q, layouts, slots_smem, interpret)
    scale = math.log2(math.e) * K**-0.5
    widen = lambda x_Q, like: lax.broadcast_in_dim(x_Q, like.shape, [0])

    def step(i, carry, masked):
        slot, sum_QK, m_Q, l_Q = carry
        ring.turn(i, slot, 0)
        s = products.scores(slot)
        slot = ring.next(slot)
        if masked:
            first = order.block(i) * tiles.keys
            refs = docs and (docs[0].at[batch, rows], docs[1].at[batch, pl.ds(first, tiles.keys)])
            last = block * tiles.queries + (S - T) - first
            visible = _visible(s.shape, layouts, last, refs, window)
            s = jnp.where(visible, s, MASKED / scale)
        m_new_Q = jnp.maximum(m_Q, s.max(1) * scale)
        p = jnp.exp2(s * scale - widen(m_new_Q, s))
        rescale_Q = jnp.exp2(m_Q - m_new_Q)
        l_Q = l_Q * rescale_Q + p.sum(1)
        ring.turn(i, slot, 1)
        sum_QK *= widen(rescale_Q, sum_QK)
        sum_QK = products.add_values(sum_QK, p.astype(q_ref.dtype), slot)
        return ring.next(slot), sum_QK, m_new_Q, l_Q

    full = lambda shape, x, layout: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)
    carry = (
        ring.start(),
        full((tiles.queries, K), 0.0, layouts.sum),
        full((tiles.queries,), LOWEST, layouts.row),
        full((tiles.queries,), 0.0, layouts.row),
    )
    carry = lax.fori_loop(0, order.unmasked, functools.partial(step, masked=False), carry)
    masked = functools.partial(step, masked=True)
    _, sum_QK, m_Q, l_Q = lax.fori_loop(order.unmasked, order.count, masked, carry)
    empty = None
    if sees_ref is not None:  # some queries may see no key
        sees = plgpu.load(sees_ref.at[batch, rows], layout=layouts.row, optimized=False)
        empty = (l_Q == 0) & (sees == 0)
        l_Q = jnp.where(empty, 1.0, l_Q)
    lse = m_Q + jnp.log(l_Q) * math.log2(math.e)
    lse_ref[batch, head, rows] = lse if empty is None else jnp.where(empty, EMPTY_ROW_LSE, lse)
    ampere.barrier(interpret)
    # Threads exchange the result in shared memory, so that each stores 16 bytes of a row.
    q_smem[...] = (sum_QK / widen(l_Q, sum_QK)).astype(o_ref.dtype)
    ampere.barrier(interpret)
    wide = plgpu.Layout.SMEM_GMEM_COPY(q_smem.shape, o_ref.dtype, mosaic.SWIZZLE_BYTES)
    o_ref[here] = plgpu.load(q_smem, layout=wide)


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    docs: Sequence[jax.Array],
    tiles: AmpereAttentionTiles,
    interpret: bool,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHK, lse_BHT) as flash_attention's forward kernel does.

    Where T or S is not a multiple of its tile, XLA pads the arrays, since copies have no bounds
    check.

    Args:
        docs: (docs_BT, docs_BS) or ().
        window: as in flash_attention.

    Raises:
        ValueError: mosaic.check refuses the arrays, or check_heads K.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    mosaic.check(q=q_BTHK, k=k_BSGK, v=v_BSGK)
    check_heads(K)
    bounds = [key_blocks.document_bounds(docs[0], docs[1], tiles, window)] if docs else []
    sees = [mosaic.pad_last(x, tiles.queries, 0) for x in sees_itself(B, T, S, docs)]
    # Padding is of a document that does not exist. Its rows and columns are never read.
    docs = [mosaic.pad_last(x, n, -1) for x, n in zip(docs, tiles[:2], strict=False)]

    def flat(x, multiple):
        x = x.reshape(*x.shape[:2], -1)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0)))

    q = flat(q_BTHK, tiles.queries)
    k, v = (flat(x, tiles.keys) for x in (k_BSGK, v_BSGK))
    memory = functools.partial(mosaic.swizzled_shared_memory, dtype=q.dtype)
    slots = memory((tiles.stages, tiles.keys, K))
    shared: Any = plgpu.RefUnion((memory((tiles.queries, K)),), (slots,))
    o, lse = ampere.call(
        functools.partial(
            _kernel, tiles=tiles, sizes=(T, S, H // G, K), window=window, interpret=interpret
        ),
        name="flash_attention_forward",
        grid={"head": H, "block": q.shape[1] // tiles.queries, "batch": B},
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, q.shape[1]), jnp.float32),
        ],
        scratch={"shared": shared},
        approximate=True,
        interpret=interpret,
    )(q, k, v, *docs, *bounds, *sees)
    return o[:, :T].reshape(q_BTHK.shape), lse[:, :, :T]

"""The backward bodies of flash_attention for Hopper: one kernel for dk and dv, one for dq.

Both have the same structure. Each multiplying warp group keeps rows of two arrays in shared memory,
(k, v) or (q, do), and the copying group brings blocks of the other two. A step computes the scores
and the probabilities' gradient, [kept rows, block], as two products at once, and adds to the sums
dk and dv, or dq, from registers. A program of dk and dv goes through all query heads that share its
key head. There are no atomics: sums have a fixed order (see flash_attention.py).

Bound: compute, 2 times the forward's FLOPs for dk and dv, 1.5 times for dq. Each kernel moves the
bytes of q, do, k, v and of its outputs, and 8*B*H*T of the log-sum-exp and delta.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.flash_attention_mosaic import check_heads, find_query_block
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tile_order import EMPTY_ROW_LSE, MASKED
from pallas_kernels.tiles import MosaicAttentionTiles

# Registers per thread. At K=128, dk, dv and the two products need 192 by themselves, and a limit of
# 232 spills (audit, ptxas 12.9.86).
COPYING_REGISTERS, MULTIPLYING_REGISTERS = 24, 240  # 24 + 2 * 240 <= 3 * 168


def _positions(shape, dim, first):
    return first + plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def _masked(s, visible, docs):
    """Returns s with MASKED where a query does not see a key.

    Args:
        visible: whether the key is not after the query.
        docs: (documents of the rows of s, of its columns) or ().
    """
    s = jnp.where(visible, s, MASKED)
    if docs:
        rows, columns = (lax.broadcast_in_dim(x, s.shape, [dim]) for dim, x in enumerate(docs))
        s = jnp.where(rows == columns, s, MASKED)
    return s


def _mask_if(needs_mask, mask):
    """Returns a function that masks only the steps where needs_mask(step).

    Two loops, one for each kind of step, would double the code and spilled at K=128 (audit, ptxas
    12.9.86).
    """
    return lambda s, step, slot: lax.cond(
        needs_mask(step), lambda s: mask(s, step, slot), lambda s: s, s
    )


def _add_block(kept, vectors, mask, dim, tiles, staging, step, sums, *, x_smem, y_smem, full, free):
    """Adds one block to the sums: ds x to the first and, where there are two, p y to the second.

    Args:
        kept: this group's shared memory: (k, v) or (q, do).
        vectors: slot -> (minus the log-sum-exp, in units of unscaled scores, minus delta). The
            accumulators of the products start from them: that needs fewer registers than to
            subtract them afterwards.
        dim: the dimension of the scores that these vectors run along.
        mask: (start of s, step, slot) -> s with MASKED where a key is not visible; the product
            that is added is too small to change it.
    """
    slot, shape = lax.rem(step, tiles.stages), (kept.shape[1], x_smem.shape[1])
    scale = math.log2(math.e) * kept.shape[2] ** -0.5
    plgpu.barrier_wait(full.at[slot])

    def products(s_ref, dp_ref):
        plgpu.wgmma(s_ref, kept.at[0], x_smem.at[slot].transpose((1, 0)))
        plgpu.wgmma(dp_ref, kept.at[1], y_smem.at[slot].transpose((1, 0)))

    s, dp = (lax.broadcast_in_dim(x, shape, [dim]) for x in vectors(slot))
    s = mask(s, step, slot)
    s, dp = mosaic.accumulate(products, [s, dp], staging is not None)
    p = jnp.exp2(s * scale)
    ds = p * dp
    factors = [x.astype(kept.dtype) for x in (ds, p)]

    def add_products(*refs):
        for n, (ref, smem) in enumerate(zip(refs, (x_smem, y_smem), strict=False)):
            buffer = None if staging is None else staging.at[n]
            mosaic.multiply_registers(ref, factors[n], smem.at[slot], buffer)

    sums = mosaic.accumulate(add_products, sums, staging is not None)
    plgpu.barrier_arrive(free.at[slot])
    return tuple(sums)


def _zeros(count, kept):
    """Returns the initial sums, [kept rows, K] each."""
    zero = jnp.zeros(kept.shape[1:], jnp.float32)
    return tuple(plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for _ in range(count))


def _read_kept(kept, kept_full, parts):
    for n, part in enumerate(parts):
        plgpu.copy_gmem_to_smem(part, kept.at[n], kept_full)
    plgpu.barrier_wait(kept_full)


def _write(kept, sums, parts):
    """Writes each sum to its part of an array, through the shared memory of the kept rows."""
    for n, x in enumerate(sums):
        kept.at[n][...] = x.astype(kept.dtype)
    plgpu.commit_smem()
    for n, part in enumerate(parts):
        plgpu.copy_smem_to_gmem(kept.at[n], part)
    plgpu.wait_smem_to_gmem(0)


def _load_along_rows(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _load_along_columns(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def _dkv_kernel(*refs, tiles, ratio, kept_smem, kept_full, vectors, staging_smem=None, **pipeline):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, position_ref, *docs, dk_ref, dv_ref = refs
    T, S = q_ref.shape[1], k_ref.shape[1]
    group, key_head, block, batch = (
        lax.axis_index(name) for name in ("group", "head", "block", "batch")
    )
    start, half = block * tiles.keys, tiles.keys // mosaic.CONSUMERS
    # The first block of queries that sees a key of this block; `count` are from there on.
    first = lax.div(jnp.maximum(start - (S - T), 0), tiles.queries)
    count = pl.cdiv(T, tiles.queries) - first

    def copies(step):
        head = key_head * ratio + lax.div(step, count)
        rows = pl.ds((first + lax.rem(step, count)) * tiles.queries, tiles.queries)
        yield q_ref.at[batch, rows, head], pipeline["x_smem"]
        yield do_ref.at[batch, rows, head], pipeline["y_smem"]
        sources = [lse_ref.at[batch, head, rows], delta_ref.at[batch, head, rows]]
        sources += [position_ref.at[rows], *(ref.at[batch, rows] for ref in docs[:1])]
        yield from zip(sources, vectors, strict=True)

    @pl.when(group == mosaic.CONSUMERS)
    def _copy():
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        stream = copies, pipeline["full"], pipeline["free"]
        mosaic.copy_steps(ratio * count, tiles.stages, [stream])

    @pl.when(group < mosaic.CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        first_row = start + group * half
        rows, kept = pl.ds(first_row, half), kept_smem.at[group]
        key_docs = [_load_along_rows(ref.at[batch, rows]) for ref in docs[1:]]
        parts = [ref.at[batch, rows, key_head] for ref in (k_ref, v_ref)]
        _read_kept(kept, kept_full.at[group], parts)
        lse_and_delta = lambda slot: [_load_along_columns(x.at[slot]) for x in vectors[:2]]
        staging = None if staging_smem is None else staging_smem.at[group]
        # From this query on all keys of the block are visible.
        all_visible = jnp.maximum(start + tiles.keys - 1 - (S - T), 0)
        masked_blocks = lax.div(all_visible + tiles.queries - 1, tiles.queries) - first

        def mask(s, step, slot):
            position, *query_docs = (_load_along_columns(x.at[slot]) for x in vectors[2:])
            position = lax.broadcast_in_dim(position, s.shape, [1])
            visible = _positions(s.shape, 0, first_row) <= position
            return _masked(s, visible, key_docs + query_docs)

        needs_mask = lambda step: lax.rem(step, count) < masked_blocks
        add_mask = mask if docs else _mask_if(needs_mask, mask)
        add_block = functools.partial(
            _add_block, kept, lse_and_delta, add_mask, 1, tiles, staging, **pipeline
        )
        dk, dv = lax.fori_loop(0, ratio * count, add_block, _zeros(2, kept))
        parts = [ref.at[batch, rows, key_head] for ref in (dk_ref, dv_ref)]
        _write(kept, (dk * kept.shape[2] ** -0.5, dv), parts)


def _dq_kernel(*refs, tiles, ratio, kept_smem, kept_full, vectors, staging_smem=None, **pipeline):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *docs, dq_ref = refs
    T, S = q_ref.shape[1], k_ref.shape[1]
    half = tiles.queries // mosaic.CONSUMERS
    group, head, key_head, batch, start, steps = find_query_block(T, S, tiles, ratio)

    def copies(j):
        rows = pl.ds(j * tiles.keys, tiles.keys)
        yield k_ref.at[batch, rows, key_head], pipeline["x_smem"]
        yield v_ref.at[batch, rows, key_head], pipeline["y_smem"]
        yield from zip([ref.at[batch, rows] for ref in docs[1:]], vectors, strict=True)

    @pl.when(group == mosaic.CONSUMERS)
    def _copy():
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        mosaic.copy_steps(steps, tiles.stages, [(copies, pipeline["full"], pipeline["free"])])

    @pl.when(group < mosaic.CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        first_row = start + group * half
        rows, kept = pl.ds(first_row, half), kept_smem.at[group]
        query_docs = [_load_along_rows(ref.at[batch, rows]) for ref in docs[:1]]
        lse, delta = (_load_along_rows(ref.at[batch, head, rows]) for ref in (lse_ref, delta_ref))
        parts = [ref.at[batch, rows, head] for ref in (q_ref, do_ref)]
        _read_kept(kept, kept_full.at[group], parts)
        staging = None if staging_smem is None else staging_smem.at[group]
        first_masked = lax.div(start + S - T + 1, tiles.keys)  # before it all keys are visible

        def mask(s, step, slot):
            pair = [*query_docs, *(_load_along_columns(x.at[slot]) for x in vectors)]
            column = _positions(s.shape, 1, step * tiles.keys)
            return _masked(s, column <= _positions(s.shape, 0, first_row + S - T), pair)

        add_mask = mask if docs else _mask_if(lambda step: step >= first_masked, mask)
        lse_and_delta = lambda slot: (lse, delta)
        add_block = functools.partial(
            _add_block, kept, lse_and_delta, add_mask, 0, tiles, staging, **pipeline
        )
        (dq,) = lax.fori_loop(0, steps, add_block, _zeros(1, kept))
        _write(kept, (dq * kept.shape[2] ** -0.5,), [dq_ref.at[batch, rows, head]])


def _call(kernel, name, tiles, sizes, vectors, arguments, grid, out_shape, interpret):
    """Runs one of the two kernels.

    Args:
        sizes: (rows that a program keeps, rows of a step).
        vectors: types of the vectors, [step] each, that are copied along with each block. If there
            are more than two, the third holds the queries' positions, counted as the keys are.
            Computed by the threads they would occupy registers through all steps, and spill.
        arguments: q, k, v, do, log-sum-exp, delta and documents.
    """
    q, k, (kept, step) = arguments[0], arguments[1], sizes
    (T, H, K), (S, G) = q.shape[1:], k.shape[1:3]
    mosaic.check(**dict(zip(("q", "k", "v", "do"), arguments, strict=False)))
    check_heads(K)
    pad = lambda x, multiple, value: jnp.pad(
        x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % multiple),), constant_values=value
    )
    scale = math.log2(math.e) * K**-0.5
    lse, delta, *docs = arguments[4:]
    lse, delta = pad(-lse / scale, tiles.queries, -EMPTY_ROW_LSE), pad(-delta, tiles.queries, 0.0)
    docs = [pad(x, size, -1) for x, size in zip(docs, (tiles.queries, tiles.keys), strict=False)]
    positions = [jnp.arange(lse.shape[2], dtype=jnp.int32) + S - T] if len(vectors) > 2 else []
    memory = functools.partial(mosaic.swizzled_shared_memory, dtype=q.dtype)
    groups, half = mosaic.CONSUMERS, kept // mosaic.CONSUMERS
    scratch = {
        "kept_smem": memory((groups, 2, half, K)),
        "x_smem": memory((tiles.stages, step, K)),
        "y_smem": memory((tiles.stages, step, K)),
        "vectors": [plgpu.SMEM((tiles.stages, step), dtype) for dtype in vectors],
        "kept_full": plgpu.Barrier(num_arrivals=2, num_barriers=groups),
        "full": plgpu.Barrier(num_arrivals=2 + len(vectors), num_barriers=tiles.stages),
        "free": plgpu.Barrier(num_arrivals=groups, num_barriers=tiles.stages),
    }
    if interpret:  # see mosaic.multiply_registers
        scratch["staging_smem"] = memory((groups, 2, half, step))
    return mosaic.call(
        functools.partial(kernel, tiles=tiles, ratio=H // G),
        name=f"flash_attention_{name}",
        grid=grid,
        out_shape=out_shape,
        scratch=scratch,
        approximate=True,
        interpret=interpret,
    )(*arguments[:4], lse, delta, *positions, *docs)


def dkv(
    arguments: Sequence[jax.Array], tiles: MosaicAttentionTiles, interpret: bool
) -> list[jax.Array]:
    """Returns [dk_BSGK, dv_BSGK].

    Args:
        arguments: q, k, v, do, log-sum-exp, delta, and the documents of queries and keys or none.
        tiles: keys a multiple of 128, queries of 64.
    """
    k, v = arguments[1:3]
    (B, S, G, _), documents = k.shape, len(arguments) > 6
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    grid = {"head": G, "block": pl.cdiv(S, tiles.keys), "batch": B}
    sizes = tiles.keys, tiles.queries
    vectors = (jnp.float32,) * 2 + (jnp.int32,) * (1 + documents)
    return _call(_dkv_kernel, "dkv", tiles, sizes, vectors, arguments, grid, shapes, interpret)


def dq(arguments: Sequence[jax.Array], tiles: MosaicAttentionTiles, interpret: bool) -> jax.Array:
    """Returns dq_BTHK; as dkv, but queries are a multiple of 128, keys of 64."""
    B, T, H, _ = arguments[0].shape
    shape = jax.ShapeDtypeStruct(arguments[0].shape, arguments[0].dtype)
    grid = {"head": H, "block": pl.cdiv(T, tiles.queries), "batch": B}
    sizes, vectors = (tiles.queries, tiles.keys), (jnp.int32,) * (len(arguments) > 6)
    return _call(_dq_kernel, "dq", tiles, sizes, vectors, arguments, grid, shape, interpret)

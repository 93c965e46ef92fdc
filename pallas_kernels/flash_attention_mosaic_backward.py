"""The backward bodies of flash_attention for Hopper: one kernel for dk and dv, one for dq.

Both have the same structure. Each multiplying warp group has rows of two arrays resident in shared
memory, (k, v) or (q, do), and the copying group loads blocks of the other two. A step computes the
scores and the probabilities' gradient, [resident rows, block], in two concurrent products, and adds
to the sums dk and dv, or dq, from registers. A program of dk and dv covers all query heads that
share its key head. There are no atomics: sums have a fixed order (see flash_attention.py).

Bound: compute, 2 times the forward's FLOPs for dk and dv, 1.5 times for dq. Each kernel moves the
bytes of q, do, k, v and its outputs, and 8*B*H*T bytes for the log-sum-exp and delta.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2
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
from pallas_kernels.flash_attention_mosaic import check_heads
from pallas_kernels.flash_attention_mosaic_sums import (
    mask_if,
    masked,
    positions,
    read_resident,
    sum_blocks,
)
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tile_order import EMPTY_ROW_LSE
from pallas_kernels.tiles import MosaicAttentionTiles

# Registers per thread. At K=128, dk, dv and the two products take 192 of them, and a limit of 232
# spills (audit, ptxas 12.9.86).
COPYING_REGISTERS, MULTIPLYING_REGISTERS = 24, 240  # 24 + 2 * 240 <= 3 * 168


def _dkv_kernel(
    sizes,
    *refs,
    resident_smem,
    resident_full,
    vectors,
    stored_queries=0,
    ds_smem: Any = None,
    staging_smem=None,
    **pipeline,
):
    tiles, ratio, window = sizes
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, position_ref, *refs = refs
    ds_ref: Any = refs.pop() if stored_queries else None
    *docs, dk_ref, dv_ref = refs
    T, S = q_ref.shape[1], k_ref.shape[1]
    group, key_head, block, batch = (
        lax.axis_index(name) for name in ("group", "head", "block", "batch")
    )
    start, half = block * tiles.keys, tiles.keys // mosaic.CONSUMERS
    steps = attention_steps.query_steps(start, tiles, T, S, window)
    if stored_queries:  # dq reads whole groups of queries
        steps = steps.rounded(stored_queries // tiles.queries, pl.cdiv(T, tiles.queries))
    first, count = steps.first, steps.count  # of each query head

    def locate(step):
        """Returns (head, queries) of a step."""
        head = key_head * ratio + lax.div(step, count)
        return head, pl.ds((first + lax.rem(step, count)) * tiles.queries, tiles.queries)

    def copies(step):
        head, rows = locate(step)
        yield q_ref.at[batch, rows, head], pipeline["x_smem"]
        yield do_ref.at[batch, rows, head], pipeline["y_smem"]
        sources = [lse_ref.at[batch, head, rows], delta_ref.at[batch, head, rows]]
        sources += [position_ref.at[rows], *(ref.at[batch, rows] for ref in docs[:1])]
        yield from zip(sources, vectors, strict=True)

    def write_ds(step):
        head, queries = locate(step)
        for n in range(mosaic.CONSUMERS):
            rows = pl.ds(start + n * half, half)
            source = ds_smem.at[lax.rem(step, tiles.stages), n]
            plgpu.copy_smem_to_gmem(source, ds_ref.at[batch, head, rows, queries])
        # The copies that are issued next let the groups write to this slot again.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(group == mosaic.CONSUMERS)
    def _copy():
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        streams = [(copies, pipeline["full"], pipeline["free"])]
        if not stored_queries:
            return mosaic.copy_steps(ratio * count, tiles.stages, streams)
        mosaic.copy_steps(ratio * count, tiles.stages, streams, write_ds)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group < mosaic.CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        first_row = start + group * half
        rows, resident = pl.ds(first_row, half), resident_smem.at[group]
        key_docs = [mosaic.load_along_rows(ref.at[batch, rows]) for ref in docs[1:]]
        parts = [ref.at[batch, rows, key_head] for ref in (k_ref, v_ref)]
        read_resident(resident, resident_full.at[group], parts)
        lse_and_delta = lambda slot: [mosaic.load_along_columns(x.at[slot]) for x in vectors[:2]]
        staging = None if staging_smem is None else staging_smem.at[group]

        def store(slot, ds):
            ds_smem[slot, group] = ds
            plgpu.commit_smem()

        def mask(factors, step, slot):
            position, *query_docs = (mosaic.load_along_columns(x.at[slot]) for x in vectors[2:])
            shape = factors[0].shape
            position = lax.broadcast_in_dim(position, shape, [1])
            key = positions(shape, 0, first_row)
            return masked(factors, key, position, window, key_docs + query_docs)

        needs_mask = lambda step: steps.needs_mask(lax.rem(step, count))
        add_mask = mask if docs else mask_if(needs_mask, mask)
        outputs = [ref.at[batch, rows, key_head] for ref in (dk_ref, dv_ref)]
        args = lse_and_delta, add_mask, 1, tiles, staging, store if stored_queries else None
        sum_blocks(resident, ratio * count, outputs, *args, **pipeline)


def _dq_kernel(sizes, *refs, resident_smem, resident_full, vectors, staging_smem=None, **pipeline):
    tiles, ratio, window = sizes
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *docs, dq_ref = refs
    T, S = q_ref.shape[1], k_ref.shape[1]
    half = tiles.queries // mosaic.CONSUMERS
    group, head, key_head, batch, start, steps = attention_steps.find_query_block(
        T, S, tiles, ratio, window
    )

    def copies(j):
        rows = pl.ds((steps.first + j) * tiles.keys, tiles.keys)
        yield k_ref.at[batch, rows, key_head], pipeline["x_smem"]
        yield v_ref.at[batch, rows, key_head], pipeline["y_smem"]
        yield from zip([ref.at[batch, rows] for ref in docs[1:]], vectors, strict=True)

    @pl.when(group == mosaic.CONSUMERS)
    def _copy():
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        mosaic.copy_steps(steps.count, tiles.stages, [(copies, pipeline["full"], pipeline["free"])])

    @pl.when(group < mosaic.CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        first_row = start + group * half
        rows, resident = pl.ds(first_row, half), resident_smem.at[group]
        query_docs = [mosaic.load_along_rows(ref.at[batch, rows]) for ref in docs[:1]]
        lse, delta = (
            mosaic.load_along_rows(ref.at[batch, head, rows]) for ref in (lse_ref, delta_ref)
        )
        parts = [ref.at[batch, rows, head] for ref in (q_ref, do_ref)]
        read_resident(resident, resident_full.at[group], parts)
        staging = None if staging_smem is None else staging_smem.at[group]
        last = first_row + (S - T) - steps.first * tiles.keys  # that the first query sees

        def mask(factors, step, slot):
            pair = [*query_docs, *(mosaic.load_along_columns(x.at[slot]) for x in vectors)]
            shape = factors[0].shape
            key = positions(shape, 1, step * tiles.keys)
            return masked(factors, key, positions(shape, 0, last), window, pair)

        add_mask = mask if docs else mask_if(steps.needs_mask, mask)
        lse_and_delta = lambda slot: (lse, delta)
        args = lse_and_delta, add_mask, 0, tiles, staging, None
        sum_blocks(resident, steps.count, [dq_ref.at[batch, rows, head]], *args, **pipeline)


def _call(
    kernel, name, tiles, sizes, vectors, arguments, grid, shapes, interpret, window, scratch=None
):
    """Runs one of the two kernels.

    Args:
        sizes: (resident rows of a program, rows of a step).
        vectors: types of the vectors, [step] each, that are copied along with each block. If there
            are more than two, the third contains the queries' positions, counted like the keys'. If
            threads computed these, they would occupy registers through all steps, and spill.
        arguments: q, k, v, do, log-sum-exp, delta and documents.
    """
    q, k, (resident, step) = arguments[0], arguments[1], sizes
    (T, H, K), (S, G) = q.shape[1:], k.shape[1:3]
    mosaic.check(**dict(zip(("q", "k", "v", "do"), arguments, strict=False)))
    mosaic.check_rows(T=T, S=S)
    check_heads(K)
    scale = math.log2(math.e) * K**-0.5
    lse, delta, *docs = arguments[4:]
    lse = mosaic.pad_last(-lse / scale, tiles.queries, -EMPTY_ROW_LSE)
    delta = mosaic.pad_last(-delta, tiles.queries, 0.0)
    docs = [mosaic.pad_last(x, n, -1) for x, n in zip(docs, tiles[:2], strict=False)]
    # Queries of padding come before every key, so that their zeros are not multiplied by inf.
    rows = jnp.arange(lse.shape[2], dtype=jnp.int32)
    positions = [jnp.where(rows < T, rows + S - T, -1)] if len(vectors) > 2 else []
    memory = functools.partial(mosaic.swizzled_shared_memory, dtype=q.dtype)
    groups, half = mosaic.CONSUMERS, resident // mosaic.CONSUMERS
    scratch = (scratch or {}) | {
        "resident_smem": memory((groups, 2, half, K)),
        "x_smem": memory((tiles.stages, step, K)),
        "y_smem": memory((tiles.stages, step, K)),
        "vectors": [plgpu.SMEM((tiles.stages, step), dtype) for dtype in vectors],
        "resident_full": plgpu.Barrier(num_arrivals=2, num_barriers=groups),
        "full": plgpu.Barrier(num_arrivals=2 + len(vectors), num_barriers=tiles.stages),
        "free": plgpu.Barrier(num_arrivals=groups, num_barriers=tiles.stages),
    }
    if tiles.variant == "turns":
        scratch["turn"] = plgpu.Barrier(num_barriers=groups)
    if interpret:  # see mosaic.multiply_registers
        scratch["staging_smem"] = memory((groups, 2, half, step))
    return mosaic.call(
        functools.partial(kernel, (tiles, H // G, window)),
        name=f"flash_attention_{name}",
        grid=grid,
        out_shape=shapes,
        scratch=scratch,
        approximate=True,
        interpret=interpret,
    )(*arguments[:4], lse, delta, *positions, *docs)


def dkv(
    arguments: Sequence[jax.Array],
    tiles: MosaicAttentionTiles,
    interpret: bool,
    window: int | None,
    stored_queries: int = 0,
) -> list[jax.Array]:
    """Returns [dk_BSGK, dv_BSGK] and, for flash_attention_mosaic_stored, the scores' gradients.

    Args:
        arguments: q, k, v, do, log-sum-exp, delta, and the documents of queries and keys or none.
        tiles: keys must be a multiple of 128, queries of 64.
        stored_queries: the queries of a group that reads the gradients, a multiple of the tiles'
            queries; 0 stores none. They have no factor 1/sqrt(K), and are [B,H,S,T], padded to
            whole tiles. Of blocks that no query of such a group sees, nothing is written.
    """
    q, k, v = arguments[:3]
    (B, S, G, _), (_, T, H, _), documents = k.shape, q.shape, len(arguments) > 6
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    grid = {"head": G, "block": pl.cdiv(S, tiles.keys), "batch": B}
    sizes, scratch = (tiles.keys, tiles.queries), {}
    if stored_queries:
        padded = pl.cdiv(S, tiles.keys) * tiles.keys, pl.cdiv(T, tiles.queries) * tiles.queries
        shapes += [jax.ShapeDtypeStruct((B, H, *padded), q.dtype)]
        block = tiles.stages, mosaic.CONSUMERS, tiles.keys // mosaic.CONSUMERS, tiles.queries
        scratch["ds_smem"] = mosaic.swizzled_shared_memory(block, q.dtype)
    vectors = (jnp.float32,) * 2 + (jnp.int32,) * (1 + documents)
    kernel = functools.partial(_dkv_kernel, stored_queries=stored_queries)
    args = sizes, vectors, arguments, grid, shapes, interpret, window, scratch
    return _call(kernel, "dkv", tiles, *args)


def dq(
    arguments: Sequence[jax.Array], tiles: MosaicAttentionTiles, interpret: bool, window: int | None
) -> jax.Array:
    """Returns dq_BTHK; like dkv, but queries must be a multiple of 128, keys of 64."""
    B, T, H, _ = arguments[0].shape
    shape = jax.ShapeDtypeStruct(arguments[0].shape, arguments[0].dtype)
    grid = {"head": H, "block": pl.cdiv(T, tiles.queries), "batch": B}
    sizes, vectors = (tiles.queries, tiles.keys), (jnp.int32,) * (len(arguments) > 6)
    args = sizes, vectors, arguments, grid, shape, interpret, window
    return _call(_dq_kernel, "dq", tiles, *args)

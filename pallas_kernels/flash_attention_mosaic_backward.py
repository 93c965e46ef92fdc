"""flash_attention's backward bodies for Hopper: dk with dv, and dq. No atomics: one order of sums.

Both have one form. Each multiplying warp group keeps rows of two arrays, (k, v) or (q, do); the
copying one brings blocks of the two others. A step makes the scores and the probabilities'
gradient, [kept rows, block], two products side by side, and from registers adds its sums: those of
dk and dv, or of dq. A program of dk and dv goes through all query heads that share its key head.

Bound: compute, as flash_attention's: 2 times the forward's FLOPs for dk and dv, 1.5 for dq. Each
moves the bytes of q, do, k, v and what it writes, and 8*B*H*T of the log-sum-exp and of delta.

Source: the products are Dao 2023's, https://arxiv.org/abs/2307.08691, algorithm 2
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.flash_attention_mosaic import check_heads, place_of
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tile_order import EMPTY_ROW_LSE, MASKED

# A thread's: dk, dv and both products alone are 192 at K=128, and 232 spill (audit, ptxas 12.9.86)
COPYING_REGISTERS, MULTIPLYING_REGISTERS = 24, 240  # 24 + 2 * 240 of 3 * 168


def _number(shape, dim, first):
    return first + plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def _masked(s, seen, docs):
    """s with MASKED where a query does not see a key.

    Args:
        seen: whether it does but for documents.
        docs: (of s' rows, of its columns) or ().
    """
    s = jnp.where(seen, s, MASKED)
    if docs:
        rows, columns = (lax.broadcast_in_dim(x, s.shape, [dim]) for dim, x in enumerate(docs))
        s = jnp.where(rows == columns, s, MASKED)
    return s


def _only_where(partly, mask):
    """mask in the steps where partly(turn); in the others all is seen. A loop for each kind of step
    is twice the code, and spilled at K=128 (audit, ptxas 12.9.86)."""
    return lambda s, turn, slot: lax.cond(
        partly(turn), lambda s: mask(s, turn, slot), lambda s: s, s
    )


def _step(kept, numbers, mask, dim, tiles, staging, turn, sums, *, x_smem, y_smem, full, free):
    """sums after one more block: those of ds x and, where there are two, of p y.

    Args:
        kept: this group's shared memory (x's partner, y's partner).
        numbers: slot -> (less the log-sum-exp, in scores before their scale, and less delta): the
            products start from them, which takes fewer registers than to subtract them later.
        dim: theirs of the scores.
        mask: (where s starts, turn, slot) -> the same, masked, which a product leaves so.
    """
    slot, shape = lax.rem(turn, tiles.stages), (kept.shape[1], x_smem.shape[1])
    scale = math.log2(math.e) * kept.shape[2] ** -0.5
    plgpu.barrier_wait(full.at[slot])

    def products(s_ref, dp_ref):
        plgpu.wgmma(s_ref, kept.at[0], x_smem.at[slot].transpose((1, 0)))
        plgpu.wgmma(dp_ref, kept.at[1], y_smem.at[slot].transpose((1, 0)))

    s, dp = (lax.broadcast_in_dim(x, shape, [dim]) for x in numbers(slot))
    s = mask(s, turn, slot)
    s, dp = mosaic.accumulate(products, [s, dp], staging is not None)
    p = jnp.exp2(s * scale)
    ds = p * dp
    parts = [x.astype(kept.dtype) for x in (ds, p)]

    def add(*refs):
        for n, (ref, smem) in enumerate(zip(refs, (x_smem, y_smem), strict=False)):
            through = None if staging is None else staging.at[n]
            mosaic.multiply_registers(ref, parts[n], smem.at[slot], through)

    sums = mosaic.accumulate(add, sums, staging is not None)
    plgpu.barrier_arrive(free.at[slot])
    return tuple(sums)


def _zeros(count, kept):
    """Sums, [kept rows, K] each."""
    zero = jnp.zeros(kept.shape[1:], jnp.float32)
    return tuple(plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for _ in range(count))


def _keep(kept, kept_full, parts):
    for n, part in enumerate(parts):
        plgpu.copy_gmem_to_smem(part, kept.at[n], kept_full)
    plgpu.barrier_wait(kept_full)


def _write(kept, sums, parts):
    """Each sum to its part of an array, through the shared memory of what was kept."""
    for n, x in enumerate(sums):
        kept.at[n][...] = x.astype(kept.dtype)
    plgpu.commit_smem()
    for n, part in enumerate(parts):
        plgpu.copy_smem_to_gmem(kept.at[n], part)
    plgpu.wait_smem_to_gmem(0)


def _of_rows(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _of_columns(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def _dkv_kernel(*refs, tiles, ratio, kept_smem, kept_full, vectors, staging=None, **pipeline):
    q_ref, k_ref, v_ref, do_ref, *columns, dk_ref, dv_ref = refs
    lse_ref, delta_ref, number_ref, *docs = columns
    T, S = q_ref.shape[1], k_ref.shape[1]
    group, shared, block, batch = (
        lax.axis_index(name) for name in ("group", "head", "block", "batch")
    )
    start, half = block * tiles.keys, tiles.keys // mosaic.CONSUMERS
    first = lax.div(jnp.maximum(start - (S - T), 0), tiles.queries)  # that sees this block
    count = pl.cdiv(T, tiles.queries) - first

    def copies(turn):
        head = shared * ratio + lax.div(turn, count)
        rows = pl.ds((first + lax.rem(turn, count)) * tiles.queries, tiles.queries)
        yield q_ref.at[batch, rows, head], pipeline["x_smem"]
        yield do_ref.at[batch, rows, head], pipeline["y_smem"]
        sources = [lse_ref.at[batch, head, rows], delta_ref.at[batch, head, rows]]
        sources += [number_ref.at[rows], *(ref.at[batch, rows] for ref in docs[:1])]
        yield from zip(sources, vectors, strict=True)

    @pl.when(group == mosaic.CONSUMERS)
    def _():
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        stream = copies, pipeline["full"], pipeline["free"]
        mosaic.copy_steps(ratio * count, tiles.stages, [stream])

    @pl.when(group < mosaic.CONSUMERS)
    def _():
        plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        mine = start + group * half
        rows, kept = pl.ds(mine, half), kept_smem.at[group]
        of_keys = [_of_rows(ref.at[batch, rows]) for ref in docs[1:]]
        _keep(kept, kept_full.at[group], [ref.at[batch, rows, shared] for ref in (k_ref, v_ref)])
        numbers = lambda slot: [_of_columns(x.at[slot]) for x in vectors[:2]]
        through = None if staging is None else staging.at[group]
        seen = jnp.maximum(start + tiles.keys - 1 - (S - T), 0)  # by whom the last key is seen
        masked = lax.div(seen + tiles.queries - 1, tiles.queries) - first

        def mask(s, turn, slot):
            number, *theirs = (_of_columns(x.at[slot]) for x in vectors[2:])
            number = lax.broadcast_in_dim(number, s.shape, [1])
            return _masked(s, _number(s.shape, 0, mine) <= number, of_keys + theirs)

        partly = lambda turn: lax.rem(turn, count) < masked
        mask = mask if docs else _only_where(partly, mask)
        step = functools.partial(_step, kept, numbers, mask, 1, tiles, through, **pipeline)
        dk, dv = lax.fori_loop(0, ratio * count, step, _zeros(2, kept))
        parts = [ref.at[batch, rows, shared] for ref in (dk_ref, dv_ref)]
        _write(kept, (dk * kept.shape[2] ** -0.5, dv), parts)


def _dq_kernel(*refs, tiles, ratio, kept_smem, kept_full, vectors, staging=None, **pipeline):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *docs, dq_ref = refs
    T, S = q_ref.shape[1], k_ref.shape[1]
    half = tiles.queries // mosaic.CONSUMERS
    group, head, shared, batch, start, steps = place_of(T, S, tiles, ratio)

    def copies(j):
        rows = pl.ds(j * tiles.keys, tiles.keys)
        yield k_ref.at[batch, rows, shared], pipeline["x_smem"]
        yield v_ref.at[batch, rows, shared], pipeline["y_smem"]
        yield from zip([ref.at[batch, rows] for ref in docs[1:]], vectors, strict=True)

    @pl.when(group == mosaic.CONSUMERS)
    def _():
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        mosaic.copy_steps(steps, tiles.stages, [(copies, pipeline["full"], pipeline["free"])])

    @pl.when(group < mosaic.CONSUMERS)
    def _():
        plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        mine = start + group * half
        rows, kept = pl.ds(mine, half), kept_smem.at[group]
        of_queries = [_of_rows(ref.at[batch, rows]) for ref in docs[:1]]
        lse, delta = (_of_rows(ref.at[batch, head, rows]) for ref in (lse_ref, delta_ref))
        _keep(kept, kept_full.at[group], [ref.at[batch, rows, head] for ref in (q_ref, do_ref)])
        through = None if staging is None else staging.at[group]
        numbers = lambda slot: (lse, delta)
        free = lax.div(start + S - T + 1, tiles.keys)  # steps whose keys all rows see

        def mask(s, j, slot):
            pair = [*of_queries, *(_of_columns(x.at[slot]) for x in vectors)]
            seen = _number(s.shape, 1, j * tiles.keys) <= _number(s.shape, 0, mine + S - T)
            return _masked(s, seen, pair)

        mask = mask if docs else _only_where(lambda j: j >= free, mask)
        step = functools.partial(_step, kept, numbers, mask, 0, tiles, through, **pipeline)
        (dq,) = lax.fori_loop(0, steps, step, _zeros(1, kept))
        _write(kept, (dq * kept.shape[2] ** -0.5,), [dq_ref.at[batch, rows, head]])


def _call(kernel, name, tiles, sizes, vectors, given, grid, out_shape, interpret):
    """One of the two kernels.

    Args:
        sizes: (rows that a program keeps, rows of a step).
        vectors: types of the vectors, [step] each, that are copied too; the third, where there are
            more than two, the queries' numbers, counted as the keys are: made by a thread they
            are registers that live through all steps, and spill.
        given: q, k, v, do, log-sum-exp, delta and documents.
    """
    q, k, (kept, step) = given[0], given[1], sizes
    (T, H, K), (S, G) = q.shape[1:], k.shape[1:3]
    mosaic.check(**dict(zip(("q", "k", "v", "do"), given, strict=False)))
    check_heads(K)
    pad = lambda x, to, value: jnp.pad(
        x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % to),), constant_values=value
    )
    scale = math.log2(math.e) * K**-0.5
    lse, delta, *docs = given[4:]
    lse, delta = pad(-lse / scale, tiles.queries, -EMPTY_ROW_LSE), pad(-delta, tiles.queries, 0.0)
    docs = [pad(x, size, -1) for x, size in zip(docs, (tiles.queries, tiles.keys), strict=False)]
    numbers = [jnp.arange(lse.shape[2], dtype=jnp.int32) + S - T] * (len(vectors) > 2)
    memory = functools.partial(mosaic.shared, dtype=q.dtype)
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
        scratch["staging"] = memory((groups, 2, half, step))
    return mosaic.call(
        functools.partial(kernel, tiles=tiles, ratio=H // G),
        name=f"flash_attention_{name}",
        grid=grid,
        out_shape=out_shape,
        scratch=scratch,
        approximate=True,
        interpret=interpret,
    )(*given[:4], lse, delta, *numbers, *docs)


def dkv(given, tiles, interpret):
    """(dk_BSGK, dv_BSGK) as flash_attention's kernel of that name.

    Args:
        given: (q, k, v, do, log-sum-exp, delta, documents of queries and of keys or neither).
        tiles: a MosaicAttentionTiles; keys a multiple of 128, queries of 64.

    Raises:
        ValueError: as flash_attention_mosaic.forward.
    """
    k, v = given[1:3]
    (B, S, G, _), documents = k.shape, len(given) > 6
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    grid = {"head": G, "block": pl.cdiv(S, tiles.keys), "batch": B}
    sizes = tiles.keys, tiles.queries
    vectors = (jnp.float32,) * 2 + (jnp.int32,) * (1 + documents)
    return _call(_dkv_kernel, "dkv", tiles, sizes, vectors, given, grid, shapes, interpret)


def dq(given, tiles, interpret):
    """dq_BTHK; arguments and errors as dkv's, but queries a multiple of 128, keys of 64."""
    B, T, H, _ = given[0].shape
    shape = jax.ShapeDtypeStruct(given[0].shape, given[0].dtype)
    grid = {"head": H, "block": pl.cdiv(T, tiles.queries), "batch": B}
    sizes, vectors = (tiles.queries, tiles.keys), (jnp.int32,) * (len(given) > 6)
    return _call(_dq_kernel, "dq", tiles, sizes, vectors, given, grid, shape, interpret)

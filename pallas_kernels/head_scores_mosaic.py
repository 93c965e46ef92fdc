"""The body of `head_scores` for Hopper: each multiplying warp group finishes whole rows of a tile.

A row's sum of exponentials is reduced in registers. What the gradient needs is written through two
small buffers of shared memory for each warp group: one is filled while TMA copies the other to HBM.
Two programs of a cluster compute tiles below each other, and share the copies of w's rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.mosaic_product import pipeline_scratch, run_products
from pallas_kernels.tile_order import LOG2E, MOST, grouped_tile
from pallas_kernels.tiles import MosaicProductTiles

STRIP_BYTES = 128  # in a row of swizzled shared memory
BUFFERS = 2


def _kernel(
    h_ref, w_ref, reference_ref, *refs, tiles, softcap, keep, kept_smem: Any = None, **pipeline
):
    (N, D), V = h_ref.shape, w_ref.shape[0]
    group, half = lax.axis_index("group"), tiles.rows // mosaic.CONSUMERS
    blocks, vocabulary_tiles = pl.cdiv(N, tiles.cluster * tiles.rows), pl.cdiv(V, tiles.columns)

    def locate(p):
        block, tile = grouped_tile(p, blocks, vocabulary_tiles, tiles.group)
        below = lax.axis_index("cluster") if tiles.cluster > 1 else 0
        return block * tiles.cluster + below, tile

    def operands(p):
        block, tile = locate(p)
        return (h_ref, block), (w_ref, tile)

    def after(p, logits):
        block, tile = locate(p)
        rows = pl.ds(block * tiles.rows + group * half, half)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)

        def write(values):
            _write(values, kept_smem.at[group], refs[0], rows, tile * tiles.columns)

        if keep == "logits":
            write(logits)
        reference = mosaic.load_along_rows(reference_ref.at[rows])
        reference = lax.broadcast_in_dim(reference, logits.shape, [0])
        e = jnp.minimum(jnp.exp2(logits * LOG2E - reference), MOST)
        if keep == "exponentials":
            write(e)
        totals = refs[-1].at[tile, rows]
        totals[...] = e.sum(1)
        if V % tiles.columns:

            @pl.when(tile == vocabulary_tiles - 1)
            def _leave_out_columns_past_V():  # their logits are 0
                column = plgpu.broadcasted_iota(
                    jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA
                )
                totals[...] = jnp.where(column < V % tiles.columns, e, 0.0).sum(1)

    count, slices = blocks * vocabulary_tiles, pl.cdiv(D, tiles.depth)
    run_products(tiles, count, slices, operands, lambda p: None, after, **pipeline)


def _write(values, smem, out_ref, rows, column):
    strip, V = smem.shape[-1], out_ref.shape[1]
    # Mosaic drops a dimension that a copy fills, with its offset. So if V is one strip, TMA would
    # not skip the others, but store them over it.
    strips = 1 if V == strip else values.shape[1] // strip
    for i in range(strips):
        buffer, first = smem.at[i % BUFFERS], i * strip
        # At most BUFFERS - 1 unfinished copies remain, so the last copy out of this buffer is done.
        plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
        buffer[...] = values[:, first : first + strip].astype(out_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref.at[rows, pl.ds(column + first, strip)])


def head_scores(
    h_ND: jax.Array,
    w_VD: jax.Array,
    reference_N: jax.Array,
    tiles: MosaicProductTiles,
    softcap: float,
    keep: str,
    kept: list[jax.ShapeDtypeStruct],
    interpret: bool,
) -> list[jax.Array]:
    """Runs the kernel of pallas_kernels.head_scores, which combines the results of the tiles.

    Args:
        reference_N: in units of log2(e).
        kept: shape and type of what `keep` names, or nothing.

    Returns:
        what `keep` names, [N,V]; then the totals, [vocabulary tiles, N].

    Raises:
        ValueError: mosaic.check refuses the arrays, or mosaic.check_rows V; what is kept has rows
            of a multiple of 64.
    """
    N, V = len(h_ND), len(w_VD)
    mosaic.check(*kept, h=h_ND, w=w_VD)
    mosaic.check_rows(V=V)
    # Rows are chunks of a batch, of any number. XLA pads h, which is small, and slices what is kept
    # where it reads it.
    h_ND = jnp.pad(h_ND, ((0, -N % mosaic.SWIZZLED_ROWS), (0, 0)))
    kept = [jax.ShapeDtypeStruct((len(h_ND), V), x.dtype) for x in kept]
    # References and totals are accessed without TMA, which would check bounds: pad.
    reference = mosaic.pad_last(reference_N, tiles.cluster * tiles.rows, 0.0)
    partial = jax.ShapeDtypeStruct((pl.cdiv(V, tiles.columns), len(reference)), jnp.float32)
    scratch = pipeline_scratch(tiles, h_ND.dtype)
    if keep:
        half = tiles.rows // mosaic.CONSUMERS
        strips = (mosaic.CONSUMERS, BUFFERS, half, STRIP_BYTES // kept[0].dtype.itemsize)
        scratch["kept_smem"] = mosaic.swizzled_shared_memory(strips, kept[0].dtype)
    count = len(reference) // (tiles.cluster * tiles.rows) * partial.shape[0]
    out = mosaic.call(
        functools.partial(_kernel, tiles=tiles, softcap=softcap, keep=keep),
        name="head_scores",
        grid={"program": mosaic.persistent_programs(count, interpret, tiles.cluster)},
        cluster=tiles.cluster,
        out_shape=[*kept, partial],
        scratch=scratch,
        approximate=not softcap,  # the fast tanh is too inaccurate
        interpret=interpret,
    )(h_ND, w_VD, reference)
    return [*(x[:N] for x in out[:-1]), out[-1][:, :N]]

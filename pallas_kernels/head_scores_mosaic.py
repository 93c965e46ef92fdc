"""head_scores' body for Hopper: each multiplying warp group finishes whole rows of its tile.

Logits leave through two small buffers a warp group, filled in turn while the copies of the one
before are on their way; a row's largest logit, sum and hit are reduced in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.mosaic_product import pipeline_scratch, run_products
from pallas_kernels.tile_order import MASKED, grouped_tile

STRIP = 32  # float32 columns in a row of swizzled shared memory
BUFFERS = 2


def _kernel(h_ref, w_ref, targets_ref, *refs, tiles, softcap, keep, logits_smem=None, **pipeline):
    (N, D), V = h_ref.shape, w_ref.shape[0]
    group, half = lax.axis_index("group"), tiles.rows // mosaic.CONSUMERS
    blocks, count = pl.cdiv(N, tiles.rows), pl.cdiv(V, tiles.columns)
    where = lambda p: grouped_tile(p, blocks, count, tiles.group)

    def operands(p):
        block, tile = where(p)
        return (h_ref, block), (w_ref, tile)

    def after(p, logits):
        block, tile = where(p)
        rows = pl.ds(block * tiles.rows + group * half, half)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        if keep:
            _write(logits, logits_smem.at[group], refs[0], rows, tile * tiles.columns)
        column = tile * tiles.columns + plgpu.broadcasted_iota(
            jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA
        )
        by_row = plgpu.Layout.WGMMA.reduce(1)
        target = plgpu.load(targets_ref.at[rows], layout=by_row, optimized=False)
        target = lax.broadcast_in_dim(target, logits.shape, [0])
        # Before the mask: past the vocabulary logits are 0, and so is what a target there hits.
        hit = jnp.where(column == target, logits, 0.0).sum(1)
        if V % tiles.columns:
            logits = jnp.where(column < V, logits, MASKED)
        top = logits.max(1)
        total = jnp.exp(logits - lax.broadcast_in_dim(top, logits.shape, [0])).sum(1)
        for ref, x in zip(refs[keep:], (top, total, hit), strict=True):
            ref[tile, rows] = x

    run_products(
        tiles, blocks * count, pl.cdiv(D, tiles.depth), operands, lambda p: None, after, **pipeline
    )


def _write(logits, smem, logits_ref, rows, column):
    for strip in range(logits.shape[1] // STRIP):
        buffer, at = smem.at[strip % BUFFERS], strip * STRIP
        plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
        buffer[...] = logits[:, at : at + STRIP]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, logits_ref.at[rows, pl.ds(column + at, STRIP)])


def head_scores(h_ND, w_VD, targets_N, tiles, softcap, keep, interpret):
    """Outputs of pallas_kernels.head_scores.head_scores' kernel: of tiles, not yet joined.

    Args:
        tiles: a MosaicProductTiles.

    Returns:
        logits_NV where they are kept, then top, total and hit, [vocabulary tiles, N] each.

    Raises:
        ValueError: as mosaic.check; logits are kept and V is no multiple of 8.
    """
    (N, _), V = h_ND.shape, w_VD.shape[0]
    logits = jax.ShapeDtypeStruct((N, V), jnp.float32)
    mosaic.check(*[logits] * keep, h=h_ND, w=w_VD)
    rows = pl.cdiv(N, tiles.rows) * tiles.rows  # these are read and written past the last row
    targets = jnp.pad(targets_N, (0, rows - N), constant_values=-1)
    part = jax.ShapeDtypeStruct((pl.cdiv(V, tiles.columns), rows), jnp.float32)
    scratch = pipeline_scratch(tiles, h_ND.dtype)
    if keep:
        half = tiles.rows // mosaic.CONSUMERS
        strips = (mosaic.CONSUMERS, BUFFERS, half, STRIP)
        scratch["logits_smem"] = mosaic.shared(strips, jnp.float32)
    count = rows // tiles.rows * part.shape[0]
    out = mosaic.call(
        functools.partial(_kernel, tiles=tiles, softcap=softcap, keep=keep),
        name="head_scores",
        grid={"program": mosaic.programs(count, interpret)},
        out_shape=[logits] * keep + [part] * 3,
        scratch=scratch,
        interpret=interpret,
    )(h_ND, w_VD, targets)
    return [*out[:keep], *(x[:, :N] for x in out[keep:])]

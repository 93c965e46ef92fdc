"""symmetric's body for Hopper: the lower triangle's tiles, stored as they are and transposed.

Each multiplying warp group's half of a tile is cut in squares: one below the diagonal is stored
twice, one above not at all, one on the diagonal is completed by its own transpose.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.mosaic_product import pipeline_scratch, run_products
from pallas_kernels.tile_order import triangle_tile


class _Triangle:
    """Tiles of X lower triangles of blocks as high as a tile: `wide` tiles lie in a block."""

    def __init__(self, X, M, tiles):
        blocks = pl.cdiv(M, tiles.rows)
        self.tiles, self.wide = tiles, tiles.rows // tiles.columns
        self.each = blocks * (blocks + 1) // 2 * self.wide
        self.count = X * self.each

    def __getitem__(self, p):
        """Matrix, block of rows, block of columns of tile p."""
        which, p = lax.div(p, self.each), lax.rem(p, self.each)
        i, j = triangle_tile(lax.div(p, self.wide))
        return which, i, j * self.wide + lax.rem(p, self.wide)


def _kernel(x_ref, y_ref, scales_ref, *refs, tiles, c_barrier=None, square_smem, **pipeline):
    *c_ref, out_ref = refs
    (X, M, N), group = x_ref.shape, lax.axis_index("group")
    triangle, side = _Triangle(X, M, tiles), tiles.rows // mosaic.CONSUMERS

    def operands(p):
        which, i, j = triangle[p]
        return (x_ref.at[which], i), (y_ref.at[which], j)

    def squares(p):
        """(first row, first column, its shared memory, the matrix) of each of a group's squares."""
        which, i, j = triangle[p]
        row = i * tiles.rows + group * side
        for b in range(tiles.columns // side):
            yield b, row, j * tiles.columns + b * side, square_smem.at[group, b], which

    def before(p):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the squares of the tile before
        if c_ref:
            plgpu.commit_smem()  # what was read of a square that was not stored
            for _, row, column, smem, which in squares(p):
                source = c_ref[0].at[which, pl.ds(row, side), pl.ds(column, side)]
                plgpu.copy_gmem_to_smem(source, smem, c_barrier.at[group])

    def after(p, sum_RC):
        sum_RC *= scales_ref[0]
        if c_ref:
            plgpu.barrier_wait(c_barrier.at[group])
        for b, row, column, smem, which in squares(p):
            tile_TT = sum_RC[:, b * side : (b + 1) * side]
            if c_ref:
                tile_TT += scales_ref[1] * smem[...].astype(jnp.float32)
            write = functools.partial(_write, tile_TT.astype(out_ref.dtype), smem)
            here = out_ref.at[which, pl.ds(row, side), pl.ds(column, side)]
            mirror = out_ref.at[which, pl.ds(column, side), pl.ds(row, side)]
            pl.when(row > column)(functools.partial(write, here, mirror))
            pl.when(row == column)(functools.partial(write, here, None))

    run_products(
        tiles, triangle.count, pl.cdiv(N, tiles.depth), operands, before, after, **pipeline
    )


def _write(tile_TT, smem, here, mirror):
    """A square, and its transpose in its mirror image's place or, None, in its own upper half."""
    mirrored = plgpu.layout_cast(tile_TT, plgpu.Layout.WGMMA_TRANSPOSED)
    if mirror is None:
        smem.transpose((1, 0))[...] = mirrored
        row, column = (
            plgpu.broadcasted_iota(jnp.int32, tile_TT.shape, dim, layout=plgpu.Layout.WGMMA)
            for dim in (0, 1)
        )
        tile_TT = jnp.where(row >= column, tile_TT, smem[...])
    smem[...] = tile_TT
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, here)
    if mirror is not None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.transpose((1, 0))[...] = mirrored
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, mirror)


def symmetric(x_XMN, y_XMN, c_XMM, scales_2, tiles, interpret):
    """As pallas_kernels.symmetric.symmetric, which calls it.

    Args:
        tiles: a MosaicProductTiles of as many columns as rows, or half as many.

    Raises:
        ValueError: as mosaic.check; M is no multiple of 8.
    """
    X, M, _ = x_XMN.shape
    c = () if c_XMM is None else (c_XMM,)
    out = jax.ShapeDtypeStruct((X, M, M), x_XMN.dtype)
    mosaic.check(out, x=x_XMN, y=y_XMN)
    side = tiles.rows // mosaic.CONSUMERS
    assert tiles.columns in (side, tiles.rows), tiles
    squares = tiles.columns // side
    scratch = pipeline_scratch(tiles, x_XMN.dtype)
    scratch["square_smem"] = mosaic.shared((mosaic.CONSUMERS, squares, side, side), x_XMN.dtype)
    if c:
        scratch["c_barrier"] = plgpu.Barrier(num_arrivals=squares, num_barriers=mosaic.CONSUMERS)
    run = mosaic.call(
        functools.partial(_kernel, tiles=tiles),
        name="symmetric_sum" if c else "symmetric",
        grid={"program": mosaic.programs(_Triangle(X, M, tiles).count, interpret)},
        out_shape=out,
        scratch=scratch,
        interpret=interpret,
    )
    return run(x_XMN, y_XMN, scales_2, *c)

"""The body of `symmetric` for Hopper: stores each tile of the lower triangle and its transpose.

Each multiplying warp group cuts its half of a tile into squares. A square below the diagonal is
stored twice, as it is and transposed; one above it is not stored. One on the diagonal is stored
once, after its lower half has been mirrored onto its upper half.
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
from pallas_kernels.tile_order import triangle_tile
from pallas_kernels.tiles import MosaicProductTiles

SMALLEST = 128  # rows of the smallest tile, a square of 64 rows for each warp group


class _Triangle:
    """Numbers the tiles of X lower triangles of square blocks, each with `per_block` tiles."""

    def __init__(self, X, M, tiles):
        blocks = pl.cdiv(M, tiles.rows)
        self.per_block = tiles.rows // tiles.columns
        self.per_matrix = blocks * (blocks + 1) // 2 * self.per_block
        self.count = X * self.per_matrix

    def locate(self, p):
        """Returns the matrix, the block of rows and the block of columns of tile p."""
        matrix, p = lax.div(p, self.per_matrix), lax.rem(p, self.per_matrix)
        i, j = triangle_tile(lax.div(p, self.per_block))
        return matrix, i, j * self.per_block + lax.rem(p, self.per_block)


def _kernel(x_ref, y_ref, scales_ref, *refs, tiles, square_smem, c_barrier: Any = None, **pipeline):
    *c_ref, out_ref = refs
    (X, M, N), group = x_ref.shape, lax.axis_index("group")
    triangle, side = _Triangle(X, M, tiles), tiles.rows // mosaic.CONSUMERS

    def operands(p):
        matrix, i, j = triangle.locate(p)
        return (x_ref.at[matrix], i), (y_ref.at[matrix], j)

    def squares(p):
        """Yields (index, first row, first column, shared memory, matrix) of each square."""
        matrix, i, j = triangle.locate(p)
        row = i * tiles.rows + group * side
        for b in range(tiles.columns // side):
            yield b, row, j * tiles.columns + b * side, square_smem.at[group, b], matrix

    def before(p):
        # The last tile's stores must have read the squares' shared memory before it is reused.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if c_ref:
            # Orders the epilogue's reads of squares that it did not store before TMA's writes.
            plgpu.commit_smem()
            for _, row, column, smem, matrix in squares(p):
                source = c_ref[0].at[matrix, pl.ds(row, side), pl.ds(column, side)]
                plgpu.copy_gmem_to_smem(source, smem, c_barrier.at[group])

    def after(p, sum_RC):
        sum_RC *= scales_ref[0]
        if c_ref:
            plgpu.barrier_wait(c_barrier.at[group])
        for b, row, column, smem, matrix in squares(p):
            tile_TT = sum_RC[:, b * side : (b + 1) * side]
            if c_ref:
                tile_TT += scales_ref[1] * smem[...].astype(jnp.float32)
            write = functools.partial(_write, tile_TT.astype(out_ref.dtype), smem)
            here = out_ref.at[matrix, pl.ds(row, side), pl.ds(column, side)]
            mirror = out_ref.at[matrix, pl.ds(column, side), pl.ds(row, side)]
            # Mosaic drops a dimension that a copy fills, with its offset. So if M is one square,
            # TMA would not skip the mirror of rows past M, but store their zeros over the matrix.
            pl.when((row > column) & (row < M))(functools.partial(write, here, mirror))
            pl.when(row == column)(functools.partial(write, here, None))

    slices = pl.cdiv(N, tiles.depth)
    run_products(tiles, triangle.count, slices, operands, before, after, **pipeline)


def _write(tile_TT, smem, here, mirror):
    """Stores a square, and its transpose in `mirror`; a None mirror means a diagonal square."""
    # Stores to a transposed view of shared memory need this register layout.
    transposed = plgpu.layout_cast(tile_TT, plgpu.Layout.WGMMA_TRANSPOSED)
    if mirror is None:
        smem.transpose((1, 0))[...] = transposed
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
        smem.transpose((1, 0))[...] = transposed
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, mirror)


def symmetric(
    x_XMN: jax.Array,
    y_XMN: jax.Array,
    c_XMM: jax.Array | None,
    scales_2: jax.Array,
    tiles: MosaicProductTiles,
    interpret: bool,
) -> jax.Array:
    """Computes pallas_kernels.symmetric.symmetric, which calls it.

    Args:
        tiles: as many columns as rows, or half as many.

    Raises:
        ValueError: mosaic.check refuses the arrays, or M is not a multiple of 64.
    """
    X, M, _ = x_XMN.shape
    if M < tiles.rows:
        tiles = tiles._replace(rows=SMALLEST, columns=min(tiles.columns, SMALLEST))
    c = () if c_XMM is None else (c_XMM,)
    out = jax.ShapeDtypeStruct((X, M, M), x_XMN.dtype)
    mosaic.check(out, x=x_XMN, y=y_XMN)
    side = tiles.rows // mosaic.CONSUMERS
    squares = tiles.columns // side
    scratch = pipeline_scratch(tiles, x_XMN.dtype)
    scratch["square_smem"] = mosaic.swizzled_shared_memory(
        (mosaic.CONSUMERS, squares, side, side), x_XMN.dtype
    )
    if c:
        scratch["c_barrier"] = plgpu.Barrier(num_arrivals=squares, num_barriers=mosaic.CONSUMERS)
    return mosaic.call(
        functools.partial(_kernel, tiles=tiles),
        name="symmetric_sum" if c else "symmetric",
        grid={"program": mosaic.persistent_programs(_Triangle(X, M, tiles).count, interpret)},
        out_shape=out,
        scratch=scratch,
        interpret=interpret,
    )(x_XMN, y_XMN, scales_2, *c)

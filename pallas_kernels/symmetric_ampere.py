"""The body of `symmetric` for Ampere and Ada: stores squares of the lower triangle, and mirrored.

A program multiplies one tile of the lower triangle of one matrix. Tiles need not divide the sizes:
the last row and column of tiles begin earlier, inside the matrix. A tile is stored in squares. Of
those that lie in two tiles, the first is skipped. A square below the diagonal is stored twice, as
it is and transposed; one on the diagonal is mirrored before it is stored.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import ampere, mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tile_order import triangle_tile
from pallas_kernels.tiles import AmpereProductTiles

SIDE = 64  # of a square; its rows are as wide as the widest swizzle
WARPS_ALONG_ROWS = 2  # of four; each warp then has a square part of the tile, and loads least


def _kernel(x_ref, y_ref, scales_ref, *refs, tiles, interpret, shared):
    *c_ref, out_ref = refs
    (x_smem, y_smem), (square_smem,) = shared
    (_, M, N), size = x_ref.shape, tiles.size
    matrix = lax.axis_index("matrix")
    layouts = ampere.Layouts(x_ref.dtype, WARPS_ALONG_ROWS)
    blocks = triangle_tile(lax.axis_index("tile"))
    row, column = (jnp.minimum(block * size, M - size) for block in blocks)

    def copies(step, slot):
        depth = pl.ds(step * tiles.depth, tiles.depth)
        yield x_ref.at[matrix, pl.ds(row, size), depth], x_smem.at[slot]
        yield y_ref.at[matrix, pl.ds(column, size), depth], y_smem.at[slot]

    slices = N // tiles.depth
    ring = ampere.Ring(tiles.stages, slices, [copies], copies=2, interpret=interpret)

    def add_slice(step, carry):
        slot, sum_TT = carry
        ring.turn(step, slot)
        x = plgpu.load(x_smem.at[slot], layout=layouts.x)
        y = plgpu.load(y_smem.at[slot].T, layout=layouts.y)
        return ring.next(slot), ampere.multiply(sum_TT, x, y, interpret)

    zero = plgpu.layout_cast(jnp.zeros((size, size), jnp.float32), layouts.sum)
    _, sum_TT = lax.fori_loop(0, slices, add_slice, (ring.start(), zero))
    sum_TT *= scales_ref[0]
    ampere.barrier(interpret)  # the squares lie where the slices were
    starts = range(0, size, SIDE)
    for n, (a, b) in enumerate((a, b) for a in starts for b in starts):
        here = row + a, column + b
        # Whether the square is in the lower triangle, and not in the tile before as well.
        new = (here[0] >= here[1]) & (here[0] >= blocks[0] * size) & (here[1] >= blocks[1] * size)

        @pl.when(new)
        def _():
            tile_SS = sum_TT[a : a + SIDE, b : b + SIDE]  # noqa: B023 - traced at once
            if c_ref:
                c_SS = _part(c_ref[0], matrix, *here)  # noqa: B023
                c_SS = plgpu.load(c_SS, layout=layouts.sum, optimized=False)
                tile_SS += scales_ref[1] * c_SS.astype(jnp.float32)
            tile_SS = tile_SS.astype(out_ref.dtype)
            _write(tile_SS, square_smem.at[n], out_ref, matrix, here, layouts, interpret)  # noqa: B023


def _part(ref, matrix, row, column):
    return ref.at[matrix, pl.ds(row, SIDE), pl.ds(column, SIDE)]


def _write(tile_SS, smem, out_ref, matrix, here, layouts, interpret):
    """Stores a square and its transpose; a diagonal one once, with its lower half mirrored."""
    # Threads exchange elements in shared memory, so that each stores 16 bytes of a row.
    wide = plgpu.Layout.SMEM_GMEM_COPY((SIDE, SIDE), tile_SS.dtype, mosaic.SWIZZLE_BYTES)
    barrier = functools.partial(ampere.barrier, interpret)
    smem[...] = tile_SS
    barrier()
    transposed = plgpu.load(smem.T, layout=layouts.sum)
    row, column = here

    @pl.when(row > column)
    def _below():
        _part(out_ref, matrix, row, column)[...] = plgpu.load(smem, layout=wide)
        barrier()
        smem[...] = transposed

    @pl.when(row == column)
    def _diagonal():
        i, j = (
            plgpu.broadcasted_iota(jnp.int32, tile_SS.shape, dim, layout=layouts.sum)
            for dim in (0, 1)
        )
        barrier()
        smem[...] = jnp.where(i >= j, tile_SS, transposed)

    barrier()
    _part(out_ref, matrix, column, row)[...] = plgpu.load(smem, layout=wide)


def symmetric(
    x_XMN: jax.Array,
    y_XMN: jax.Array,
    c_XMM: jax.Array | None,
    scales_2: jax.Array,
    tiles: AmpereProductTiles,
    interpret: bool,
) -> jax.Array:
    """Computes pallas_kernels.symmetric.symmetric, which calls it.

    Raises:
        ValueError: mosaic.check refuses the arrays, or M is not a multiple of 64, or less than
            tiles.size.
    """
    X, M, _ = x_XMN.shape
    c = () if c_XMM is None else (c_XMM,)
    out = jax.ShapeDtypeStruct((X, M, M), x_XMN.dtype)
    mosaic.check(out, x=x_XMN, y=y_XMN)
    if M < tiles.size:
        raise ValueError(
            f"tiles.size must be at most the rows of x, M={M}; got {tiles.size}. Give smaller ones."
        )
    blocks, squares = pl.cdiv(M, tiles.size), (tiles.size // SIDE) ** 2
    memory = functools.partial(mosaic.swizzled_shared_memory, dtype=x_XMN.dtype)
    slices = memory((tiles.stages, tiles.size, tiles.depth))
    return ampere.call(
        functools.partial(_kernel, tiles=tiles, interpret=interpret),
        name="symmetric_sum" if c else "symmetric",
        grid={"matrix": X, "tile": blocks * (blocks + 1) // 2},
        out_shape=out,
        scratch={"shared": plgpu.RefUnion((slices, slices), (memory((squares, SIDE, SIDE)),))},
        interpret=interpret,
    )(x_XMN, y_XMN, scales_2, *c)

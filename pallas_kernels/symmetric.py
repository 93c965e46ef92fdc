"""scale * X Y^T + shift * C by its lower triangle alone: Newton-Schulz' square products.

All matrices of an iteration but X itself are polynomials of one Gram matrix: symmetric, and so are
their products. Bound: compute. Of X matrices [M,N] it does M*(M+tile)*N multiply-adds, half of a
plain product's, and writes M*M elements: each tile and, transposed, its mirror image, so that the
result is symmetric to the bit. The sum with C is the product's epilogue: no pass of its own.

Source: the idea of computing one triangle and storing twice is flash-muon's,
https://github.com/nil0x9/flash-muon
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.tile_order import triangle_tile
from pallas_kernels.tiles import MosaicProductTiles


def symmetric_reference(x_XMN, y_XMN=None, c_XMM=None, scales=(1.0, 0.0)):
    """The law: float32 sums, rounded once to x.dtype. -> [X,M,M]"""
    wide = jnp.promote_types(x_XMN.dtype, jnp.float32)
    y_XMN = x_XMN if y_XMN is None else y_XMN
    product = scales[0] * jnp.einsum("xmk,xjk->xmj", x_XMN, y_XMN, preferred_element_type=wide)
    if c_XMM is not None:
        product += scales[1] * c_XMM.astype(wide)
    return product.astype(x_XMN.dtype)


def _kernel(x_ref, y_ref, scales_ref, *refs, tiles):
    *c_ref, out_ref = refs
    M, N = x_ref.shape[1:]
    which, size = pl.program_id(1), tiles.rows
    i, j = triangle_tile(pl.program_id(0))
    rows, columns = i * size + jnp.arange(size), j * size + jnp.arange(size)

    def one(turn, sum_TT):
        depth = turn * tiles.depth + jnp.arange(tiles.depth)

        def read(ref, at):
            mask = (at < M)[:, None] & (depth < N)[None, :]
            return triton.load(ref.at[which, at[:, None], depth[None, :]], mask=mask, other=0.0)

        return sum_TT + triton.dot(read(x_ref, rows), read(y_ref, columns), trans_b=True)

    zero = jnp.zeros((size, size), jnp.float32)
    tile_TT = scales_ref[0] * jax.lax.fori_loop(0, pl.cdiv(N, tiles.depth), one, zero)
    mask = (rows < M)[:, None] & (columns < M)[None, :]
    here, mirror = (rows[:, None], columns[None, :]), (columns[:, None], rows[None, :])
    if c_ref:
        c_TT = triton.load(c_ref[0].at[which, *here], mask=mask, other=0.0)
        tile_TT += scales_ref[1] * c_TT.astype(jnp.float32)
    tile_TT = tile_TT.astype(out_ref.dtype)
    # Of a tile on the diagonal the part above it is not stored: the mirror image brings it.
    lower = mask & (rows[:, None] >= columns[None, :])
    triton.store(out_ref.at[which, *here], tile_TT, mask=lower)
    triton.store(out_ref.at[which, *mirror], tile_TT.T, mask=lower.T)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def symmetric(x_XMN, y_XMN=None, c_XMM=None, scales=(1.0, 0.0), *, tiles, interpret=False):
    """symmetric_reference, half of it computed; for one device's matrices.

    Args:
        x_XMN, y_XMN: bfloat16, float16 or float32 (in full, not TF32); y is x where it is None.
            The law is met where x y^T is symmetric; of what is not, the lower triangle counts.
        c_XMM: what is added, of x's type and symmetric, or None.
        scales: of the product and of c; they may be traced.
        tiles: a ProductTiles with as many rows as columns, or a MosaicProductTiles; its type
            selects the body.
        interpret: runs without a GPU, for tests.
    """
    X, M, _ = x_XMN.shape
    y_XMN = x_XMN if y_XMN is None else y_XMN
    scales_2 = jnp.stack(scales).astype(jnp.float32)
    if isinstance(tiles, MosaicProductTiles):
        from pallas_kernels import symmetric_mosaic  # it imports Mosaic, and this file

        return symmetric_mosaic.symmetric(x_XMN, y_XMN, c_XMM, scales_2, tiles, interpret)
    assert tiles.rows == tiles.columns, tiles
    blocks = pl.cdiv(M, tiles.rows)
    c = () if c_XMM is None else (c_XMM,)
    return triton.call(
        functools.partial(_kernel, tiles=tiles),
        name="symmetric_sum" if c else "symmetric",
        grid=(blocks * (blocks + 1) // 2, X),
        out_shape=triton.like(x_XMN, shape=(X, M, M)),
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )(x_XMN, y_XMN, scales_2, *c)

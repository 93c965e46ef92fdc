"""Computes scale * X Y^T + shift * C, a product of Newton-Schulz, from its lower triangle.

In a Newton-Schulz iteration every matrix except X itself is a polynomial of one Gram matrix. Such
matrices are symmetric and commute, so their products are symmetric too.

Bound: compute. For each matrix [M,N] the kernel does M*(M+tile)*N FLOPs, about half of a plain
product's 2*M*M*N. It writes M*M elements: each tile and its transpose, so the result is bitwise
symmetric. C is added in the product's epilogue, without another pass over memory.

Source: computing one triangle and storing it twice follows flash-muon,
https://github.com/nil0x9/flash-muon
"""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.tile_order import triangle_tile
from pallas_kernels.tiles import AmpereProductTiles, MosaicProductTiles, ProductTiles, body_of
from pallas_kernels.validation import check_symmetric


def symmetric_reference(
    x_XMN: jax.Array,
    y_XMN: jax.Array | None = None,
    c_XMM: jax.Array | None = None,
    scales: tuple[float | jax.Array, float | jax.Array] = (1.0, 0.0),
) -> jax.Array:
    """Reference implementation: float32 sums, rounded once to x.dtype. Returns [X,M,M]."""
    wide = jnp.promote_types(x_XMN.dtype, jnp.float32)
    y_XMN = x_XMN if y_XMN is None else y_XMN
    product = scales[0] * jnp.einsum("xmk,xjk->xmj", x_XMN, y_XMN, preferred_element_type=wide)
    if c_XMM is not None:
        product += scales[1] * c_XMM.astype(wide)
    return product.astype(x_XMN.dtype)


def _kernel(x_ref, y_ref, scales_ref, *refs, tiles):
    *c_ref, out_ref = refs
    M, N = x_ref.shape[1:]
    matrix, size = pl.program_id(1), tiles.rows
    i, j = triangle_tile(pl.program_id(0))
    rows, columns = i * size + jnp.arange(size), j * size + jnp.arange(size)

    def add_slice(step, sum_TT):
        depth = step * tiles.depth + jnp.arange(tiles.depth)

        def read(ref, index):
            mask = (index < M)[:, None] & (depth < N)[None, :]
            block = ref.at[matrix, index[:, None], depth[None, :]]
            return triton.load(block, mask=mask, other=0.0)

        return sum_TT + triton.dot(read(x_ref, rows), read(y_ref, columns), trans_b=True)

    zero = jnp.zeros((size, size), jnp.float32)
    tile_TT = scales_ref[0] * jax.lax.fori_loop(0, pl.cdiv(N, tiles.depth), add_slice, zero)
    mask = (rows < M)[:, None] & (columns < M)[None, :]
    here, mirror = (rows[:, None], columns[None, :]), (columns[:, None], rows[None, :])
    if c_ref:
        c_TT = triton.load(c_ref[0].at[matrix, *here], mask=mask, other=0.0)
        tile_TT += scales_ref[1] * c_TT.astype(jnp.float32)
    tile_TT = tile_TT.astype(out_ref.dtype)
    # A tile on the diagonal stores only its lower triangle; the transposed store fills the upper.
    lower = mask & (rows[:, None] >= columns[None, :])
    triton.store(out_ref.at[matrix, *here], tile_TT, mask=lower)
    triton.store(out_ref.at[matrix, *mirror], tile_TT.T, mask=lower.T)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def symmetric(
    x_XMN: jax.Array,
    y_XMN: jax.Array | None = None,
    c_XMM: jax.Array | None = None,
    scales: tuple[float | jax.Array, float | jax.Array] = (1.0, 0.0),
    *,
    tiles: ProductTiles | MosaicProductTiles | AmpereProductTiles,
    interpret: bool = False,
) -> jax.Array:
    """Computes symmetric_reference from one triangle, on one device's matrices.

    Args:
        x_XMN, y_XMN: bfloat16, float16 or float32 (in full, not TF32); y defaults to x. The result
            equals the reference where x y^T is symmetric; otherwise it mirrors the lower triangle.
        c_XMM: a symmetric matrix of x's type that is added, or None.
        scales: factors of the product and of c; they may be traced.
        tiles: their type selects the body; a ProductTiles has as many rows as columns.
        interpret: runs without a GPU, for tests.

    Raises:
        ValueError: check_symmetric refuses the arguments, or a Mosaic body.
    """
    check_symmetric(x_XMN, y_XMN, c_XMM, scales, tiles)
    X, M, _ = x_XMN.shape
    y_XMN = x_XMN if y_XMN is None else y_XMN
    scales_2 = jnp.stack(scales).astype(jnp.float32)
    if (body := body_of(tiles)) != "triton":
        # Imports Mosaic GPU, which not every JAX has.
        module = importlib.import_module(f"pallas_kernels.symmetric_{body}")
        return module.symmetric(x_XMN, y_XMN, c_XMM, scales_2, tiles, interpret)
    assert isinstance(tiles, ProductTiles)
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

"""X X^T of a stack of matrices by its lower triangle alone: Newton-Schulz' first product.

Bound: compute. Of X matrices [M,N] it does M*(M+tile)*N multiply-adds where a plain product does
2*M*M*N FLOPs' worth, and writes M*M elements: each tile and, transposed, its mirror image, so
that the result is symmetric to the bit.

Source: the idea of computing one triangle and storing twice is flash-muon's,
https://github.com/nil0x9/flash-muon
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton

TILE, DEPTH, WARPS, STAGES = 128, 32, 4, 3  # 198 registers on sm_86, no spill (audit)


def symmetric_reference(x_XMN):
    """The law: float32 sums, rounded once to x.dtype. [X,M,N] -> [X,M,M]"""
    wide = jnp.promote_types(x_XMN.dtype, jnp.float32)
    product = jnp.einsum("xmk,xjk->xmj", x_XMN, x_XMN, preferred_element_type=wide)
    return product.astype(x_XMN.dtype)


def _place(p):
    """Row and column of tile p of a lower triangle, counted row by row."""
    row = ((jnp.sqrt(8.0 * p.astype(jnp.float32) + 1.0) - 1.0) / 2.0).astype(jnp.int32)
    row = jnp.where(row * (row + 1) // 2 > p, row - 1, row)  # float32 may be off by one
    row = jnp.where((row + 1) * (row + 2) // 2 <= p, row + 1, row)
    return row, p - row * (row + 1) // 2


def _kernel(x_ref, out_ref):
    M, N = x_ref.shape[1:]
    which = pl.program_id(1)
    i, j = _place(pl.program_id(0))
    span = jnp.arange(TILE)
    rows, columns = i * TILE + span, j * TILE + span

    def one(turn, sum_TT):
        depth = turn * DEPTH + jnp.arange(DEPTH)

        def read(at):
            mask = (at < M)[:, None] & (depth < N)[None, :]
            return triton.load(x_ref.at[which, at[:, None], depth[None, :]], mask=mask, other=0.0)

        return sum_TT + triton.dot(read(rows), read(columns), trans_b=True)

    turns = -(-N // DEPTH)
    sum_TT = jax.lax.fori_loop(0, turns, one, jnp.zeros((TILE, TILE), jnp.float32))
    tile_TT = sum_TT.astype(out_ref.dtype)
    mask = (rows < M)[:, None] & (columns < M)[None, :]
    # Of a tile on the diagonal the part above it is not stored: the mirror image brings it.
    lower = mask & (rows[:, None] >= columns[None, :])
    triton.store(out_ref.at[which, rows[:, None], columns[None, :]], tile_TT, mask=lower)
    triton.store(out_ref.at[which, columns[:, None], rows[None, :]], tile_TT.T, mask=lower.T)


@functools.partial(jax.jit, static_argnames="interpret")
def symmetric(x_XMN, interpret=False):
    """symmetric_reference, half of it computed; for one device's matrices.

    Args:
        x_XMN: bfloat16, float16 or float32 (in full, not TF32).
        interpret: runs without a GPU, for tests.
    """
    X, M, _ = x_XMN.shape
    tiles = -(-M // TILE)
    return triton.call(
        _kernel,
        name="symmetric",
        grid=(tiles * (tiles + 1) // 2, X),
        out_shape=triton.like(x_XMN, shape=(X, M, M)),
        warps=WARPS,
        stages=STAGES,
        interpret=interpret,
    )(x_XMN)

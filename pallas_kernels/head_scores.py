"""Computes logits, and what cross-entropy needs of each row, in one matrix product.

A program computes one tile of logits. With the tile it stores, for each row, the largest logit (m),
the sum of exp(logit - m) (l) and the target's logit. A row's log-sum-exp, m + log(l), follows from
these partial results, so the loss reads no logits. The gradient is softmax - onehot, for which the
kernel stores exp(logit - m), of a 16-bit model in 16 bits: the softmax is exp(m - log-sum-exp)
times that, and its relative error does not grow with the logits, as with logits in 16 bits. The
kernel writes 2*N*V bytes and XLA then moves 4*N*V, against 18*N*V without the kernel
(python -m pallas_kernels.traffic). The gradient of a softcap needs the logits themselves, so they
are stored, in float32. Where no gradient is needed, nothing of size N*V is written.

Bound: compute, 2*N*D*V FLOPs. Tiles are visited in groups of row blocks, so that the operands that
programs share stay in the A40's 6 MB L2 cache. If each program walked the vocabulary for its own
rows, 100 TFLOP/s would need 770 GB/s, and the A40 has 696 GB/s.

Source: partial log-sum-exps by tile: Wijmans et al. 2024, https://arxiv.org/abs/2411.09009;
grouped tiles: Triton's tutorial 03,
https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.tile_order import LOWEST, MASKED, grouped_tile
from pallas_kernels.tiles import MosaicProductTiles, ProductTiles
from pallas_kernels.validation import check_head_scores


class Scores(NamedTuple):
    """Results for N rows; the log-sum-exp of a row is top + log(total)."""

    logits_NV: jax.Array | None  # float32, after the softcap; None unless asked for
    top_N: jax.Array  # m, the largest logit
    total_N: jax.Array  # l, the sum of exp(logit - m)
    hit_N: jax.Array  # the target's logit; 0 where the target is not in this part of V
    exponentials_NV: jax.Array | None = None  # exp(logit - m of its tile); None unless asked for
    tops_NP: jax.Array | None = None  # m of each of P tiles, with the exponentials

    def softmax(self, lse_N: jax.Array) -> jax.Array:
        """Returns exp(logit - lse), [N,V] in float32, from what was kept.

        Args:
            lse_N: log-sum-exps, which may be those of a vocabulary that is split over devices.
        """
        if self.logits_NV is not None:
            return jnp.exp(self.logits_NV - lse_N[:, None])
        assert self.exponentials_NV is not None and self.tops_NP is not None, "nothing was kept"
        (N, V), P = self.exponentials_NV.shape, self.tops_NP.shape[1]
        columns = _tile_columns(V, P)
        factor_NP = jnp.exp(self.tops_NP - lse_N[:, None])
        factor_NV = jnp.broadcast_to(factor_NP[:, :, None], (N, P, columns)).reshape(N, -1)[:, :V]
        return factor_NV * self.exponentials_NV.astype(factor_NV.dtype)


def _tile_columns(V: int, P: int) -> int:
    """Returns the columns of a tile, of which P cover V; check_head_scores wants powers of two."""
    return 1 << (pl.cdiv(V, P) - 1).bit_length()


def head_scores_reference(
    h_ND: jax.Array,
    w_VD: jax.Array,
    targets_N: jax.Array,
    softcap: float = 0.0,
    keep: str = "logits",
) -> Scores:
    """Reference implementation: sums in at least float32; a target outside [0, V) gives hit 0."""
    wide = jnp.promote_types(h_ND.dtype, jnp.float32)
    logits_NV = jnp.einsum("ND,VD->NV", h_ND, w_VD, preferred_element_type=wide)
    if softcap:
        logits_NV = softcap * jnp.tanh(logits_NV / softcap)
    top_N = logits_NV.max(1)
    total_N = jnp.exp(logits_NV - top_N[:, None]).sum(1)
    hit_N = (jax.nn.one_hot(targets_N, len(w_VD), dtype=wide) * logits_NV).sum(1)
    kept = logits_NV if keep == "logits" else None
    if keep != "exponentials":
        return Scores(kept, top_N, total_N, hit_N)
    exponentials_NV = jnp.exp(logits_NV - top_N[:, None]).astype(h_ND.dtype)
    return Scores(None, top_N, total_N, hit_N, exponentials_NV, top_N[:, None])


def _kernel(h_ref, w_ref, targets_ref, *out_refs, tiles, softcap, keep):
    (N, D), V = h_ref.shape, w_ref.shape[0]
    block, tile = grouped_tile(
        pl.program_id(0), pl.cdiv(N, tiles.rows), pl.cdiv(V, tiles.columns), tiles.group
    )
    rows = block * tiles.rows + jnp.arange(tiles.rows)
    columns = tile * tiles.columns + jnp.arange(tiles.columns)

    def add_slice(step, sum_RC):
        depth = step * tiles.depth + jnp.arange(tiles.depth)

        def read(ref, index):
            mask = (index < ref.shape[0])[:, None] & (depth < D)[None, :]
            return triton.load(ref.at[index[:, None], depth[None, :]], mask=mask, other=0.0)

        return sum_RC + triton.dot(read(h_ref, rows), read(w_ref, columns), trans_b=True)

    zero = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    logits = jax.lax.fori_loop(0, pl.cdiv(D, tiles.depth), add_slice, zero)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    inside = rows < N

    def write(values):
        mask = inside[:, None] & (columns < V)[None, :]
        out = out_refs[0].at[rows[:, None], columns[None, :]]
        triton.store(out, values.astype(out_refs[0].dtype), mask=mask)

    if keep == "logits":
        write(logits)
    target = triton.load(targets_ref.at[rows], mask=inside, other=-1)
    # Computed before the masking: columns past V have logit 0, so a target there gives hit 0.
    hit = jnp.where(columns[None, :] == target[:, None], logits, 0.0).sum(1)
    logits = jnp.where((columns < V)[None, :], logits, MASKED)
    m_R = jnp.maximum(jnp.max(logits, 1), LOWEST)  # if all are -inf, -inf - m must not be nan
    e = jnp.exp(logits - m_R[:, None])
    if keep == "exponentials":
        write(e)
    for ref, x in zip(out_refs[bool(keep) :], (m_R, e.sum(1), hit), strict=True):
        triton.store(ref.at[tile, rows], x, mask=inside)


@functools.partial(jax.jit, static_argnames=("tiles", "softcap", "keep", "interpret"))
def head_scores(
    h_ND: jax.Array,
    w_VD: jax.Array,
    targets_N: jax.Array,
    tiles: ProductTiles | MosaicProductTiles,
    softcap: float = 0.0,
    keep: str = "logits",
    interpret: bool = False,
) -> Scores:
    """Computes head_scores_reference in one product, on one device's rows and its part of V.

    Args:
        h_ND, w_VD: bfloat16, float16 or float32 (in full, not TF32).
        targets_N: int32.
        tiles: its type selects the body.
        softcap: c in c*tanh(logits/c); 0 for none.
        keep: what to return for the gradient: "logits" in float32, "exponentials" in h's type, or
            "" for nothing.
        interpret: runs without a GPU, for tests.

    Raises:
        ValueError: check_head_scores refuses the arguments, or the Mosaic body.
    """
    check_head_scores(h_ND, w_VD, targets_N, tiles, softcap, keep)
    (N, _), V = h_ND.shape, w_VD.shape[0]
    dtype = h_ND.dtype if keep == "exponentials" else jnp.float32
    kept = [jax.ShapeDtypeStruct((N, V), dtype)] if keep else []
    if isinstance(tiles, MosaicProductTiles):
        from pallas_kernels import head_scores_mosaic as mosaic  # not every JAX has Mosaic

        out = mosaic.head_scores(h_ND, w_VD, targets_N, tiles, softcap, keep, kept, interpret)
    else:
        vocabulary_tiles = pl.cdiv(V, tiles.columns)
        partial = jax.ShapeDtypeStruct((vocabulary_tiles, N), jnp.float32)
        out = triton.call(
            functools.partial(_kernel, tiles=tiles, softcap=softcap, keep=keep),
            name="head_scores",
            grid=(pl.cdiv(N, tiles.rows) * vocabulary_tiles,),
            out_shape=[*kept, partial, partial, partial],
            warps=tiles.warps,
            stages=tiles.stages,
            interpret=interpret,
        )(h_ND, w_VD, targets_N)
    top_PN, total_PN, hit_PN = out[bool(keep) :]  # from each of P vocabulary tiles
    top_N = top_PN.max(0)
    total_N = (total_PN * jnp.exp(top_PN - top_N)).sum(0)  # rescales each l to the common maximum
    # A GPU's maximum may drop nan; l keeps it.
    top_N = jnp.where(jnp.isnan(total_N), jnp.nan, top_N)
    logits_NV = out[0] if keep == "logits" else None
    scores = Scores(logits_NV, top_N, total_N, hit_PN.sum(0))
    if keep != "exponentials":
        return scores
    return scores._replace(exponentials_NV=out[0], tops_NP=top_PN.T)

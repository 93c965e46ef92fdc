"""Logits of a chunk of rows, with what cross-entropy needs of each row, out of one product.

A tile of logits leaves the product with its largest entry, its sum of exponentials and its share of
the target's logit. So the loss reads no logit, and its gradient, softmax - onehot, reads each
once: 4*N*V bytes written here and 6*N*V moved after it by XLA, which without this kernel moves
18*N*V (python -m pallas_kernels.traffic). Without gradients no logit is written at all.

Bound: compute, 2*N*D*V FLOPs. Tiles are visited in groups of rows, so that what they share stays in
the 6 MB of an A40's second-level cache: a program that walked the vocabulary for its rows would
want 770 GB/s at 100 TFLOP/s, of the 696 there are.

Source: the idea of partial log-sum-exps by tile is Wijmans et al. 2024's,
https://arxiv.org/abs/2411.09009; of grouped tiles Triton's tutorial 03,
https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.tile_order import MASKED, grouped_tile
from pallas_kernels.tiles import MosaicProductTiles


class Scores(NamedTuple):
    """Of N rows; the log-sum-exp of a row is top + log(total)."""

    logits_NV: jax.Array | None  # float32, capped; None where they are not kept
    top_N: jax.Array  # the largest logit
    total_N: jax.Array  # sum of exp(logit - top)
    hit_N: jax.Array  # the target's logit, 0 where no column is the target's


def head_scores_reference(h_ND, w_VD, targets_N, softcap=0.0, keep=True):
    """The law: sums in at least float32; a target outside [0, V) hits nothing."""
    wide = jnp.promote_types(h_ND.dtype, jnp.float32)
    logits_NV = jnp.einsum("ND,VD->NV", h_ND, w_VD, preferred_element_type=wide)
    if softcap:
        logits_NV = softcap * jnp.tanh(logits_NV / softcap)
    top_N = logits_NV.max(1)
    total_N = jnp.exp(logits_NV - top_N[:, None]).sum(1)
    hit_N = (jax.nn.one_hot(targets_N, len(w_VD), dtype=wide) * logits_NV).sum(1)
    return Scores(logits_NV if keep else None, top_N, total_N, hit_N)


def _kernel(h_ref, w_ref, targets_ref, *out_refs, tiles, softcap, keep):
    (N, D), V = h_ref.shape, w_ref.shape[0]
    block, tile = grouped_tile(
        pl.program_id(0), pl.cdiv(N, tiles.rows), pl.cdiv(V, tiles.columns), tiles.group
    )
    rows = block * tiles.rows + jnp.arange(tiles.rows)
    columns = tile * tiles.columns + jnp.arange(tiles.columns)

    def one(turn, sum_RC):
        depth = turn * tiles.depth + jnp.arange(tiles.depth)

        def read(ref, at):
            mask = (at < ref.shape[0])[:, None] & (depth < D)[None, :]
            return triton.load(ref.at[at[:, None], depth[None, :]], mask=mask, other=0.0)

        return sum_RC + triton.dot(read(h_ref, rows), read(w_ref, columns), trans_b=True)

    zero = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    logits = jax.lax.fori_loop(0, pl.cdiv(D, tiles.depth), one, zero)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    inside = rows < N
    if keep:
        mask = inside[:, None] & (columns < V)[None, :]
        triton.store(out_refs[0].at[rows[:, None], columns[None, :]], logits, mask=mask)
    target = triton.load(targets_ref.at[rows], mask=inside, other=-1)
    # Before the mask: past the vocabulary logits are 0, and so is what a target there hits.
    hit = jnp.where(columns[None, :] == target[:, None], logits, 0.0).sum(1)
    logits = jnp.where((columns < V)[None, :], logits, MASKED)
    top = logits.max(1)
    total = jnp.exp(logits - top[:, None]).sum(1)
    for ref, x in zip(out_refs[keep:], (top, total, hit), strict=True):
        triton.store(ref.at[tile, rows], x, mask=inside)


@functools.partial(jax.jit, static_argnames=("tiles", "softcap", "keep", "interpret"))
def head_scores(h_ND, w_VD, targets_N, tiles, softcap=0.0, keep=True, interpret=False):
    """head_scores_reference, in one product; for one device's rows and its part of V.

    Args:
        h_ND, w_VD: bfloat16, float16 or float32 (in full, not TF32).
        targets_N: int32.
        tiles: a ProductTiles or a MosaicProductTiles: its type says which body runs.
        softcap: c in c*tanh(logits/c), or 0.
        keep: whether logits are written.
        interpret: runs without a GPU, for tests.
    """
    if isinstance(tiles, MosaicProductTiles):
        from pallas_kernels import head_scores_mosaic  # it imports Mosaic, and this file

        run = head_scores_mosaic.head_scores
    else:
        run = _head_scores
    out = run(h_ND, w_VD, targets_N, tiles, softcap, keep, interpret)
    top_PN, total_PN, hit_PN = out[keep:]
    top_N = top_PN.max(0)
    total_N = (total_PN * jnp.exp(top_PN - top_N)).sum(0)
    return Scores(out[0] if keep else None, top_N, total_N, hit_PN.sum(0))


def _head_scores(h_ND, w_VD, targets_N, tiles, softcap, keep, interpret):
    (N, _), V = h_ND.shape, w_VD.shape[0]
    count = pl.cdiv(V, tiles.columns)
    part = jax.ShapeDtypeStruct((count, N), jnp.float32)
    return triton.call(
        functools.partial(_kernel, tiles=tiles, softcap=softcap, keep=keep),
        name="head_scores",
        grid=(pl.cdiv(N, tiles.rows) * count,),
        out_shape=[jax.ShapeDtypeStruct((N, V), jnp.float32)] * keep + [part] * 3,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )(h_ND, w_VD, targets_N)

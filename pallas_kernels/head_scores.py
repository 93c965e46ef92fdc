"""Computes the logits' exponentials, which are all that cross-entropy needs, in one matrix product.

A program computes one tile of logits and stores, for each row, the sum of exp(logit - reference).
The caller chooses one reference for each row, so all tiles of a row have the same one: a row's
log-sum-exp is reference + log(total), and its softmax is exp(logit - reference) / total.

The gradient is softmax - onehot. For it the kernel stores the exponentials of a 16-bit model in 16
bits, whose relative error does not grow with the logits. Only the gradient's two products read them
(`head_gradients`): the factor 1 / total is put on the rows of h and of the result, and the onehot
changes one number of each row. The kernel writes 2*N*V bytes and the products read 4*N*V, against
18*N*V without the kernel (python -m pallas_kernels.traffic). The gradient of a softcap needs the
logits themselves, so they are stored, in float32. Where no gradient is needed, nothing of size N*V
is written.

The reference must be near the largest logit of its row. A loss takes the target's logit, which
costs no product, plus REFERENCE_SHIFT. Then exponentials are exact to rounding for logits from 43
nats below the target's (smaller ones have softmax * V under 1e-13) to 110 nats above it. Beyond
that they saturate, so the loss of a token is at most about 110 nats + log(V). Maxima are not
needed, so a logit costs one FMA, one exp2, one minimum, one sum and half a conversion.

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
from pallas_kernels.tile_order import LOG2E, MOST, grouped_tile
from pallas_kernels.tiles import MosaicProductTiles, ProductTiles
from pallas_kernels.validation import check_head_scores

SHIFT = 64.0  # the target's exponential is 2**-SHIFT, so that there is room for larger ones
REFERENCE_SHIFT = SHIFT / LOG2E  # a row's reference, less its target's logit


class Scores(NamedTuple):
    """Results for N rows."""

    total_N: jax.Array  # float32, sum of exp(logit - reference)
    kept_NV: jax.Array | None = None  # exponentials or logits, as `keep` says


def target_logits(
    h_ND: jax.Array, w_VD: jax.Array, targets_N: jax.Array, softcap: float = 0.0
) -> jax.Array:
    """Returns each row's logit of its target, [N] in at least float32; 0 outside [0, V).

    A row's reference for head_scores is this plus REFERENCE_SHIFT. If V is split over devices, it
    is the sum of their results plus REFERENCE_SHIFT, as one of them has the target.
    """
    V, wide = len(w_VD), jnp.promote_types(h_ND.dtype, jnp.float32)
    inside_N = (targets_N >= 0) & (targets_N < V)
    w_ND = w_VD[jnp.where(inside_N, targets_N, 0)].astype(wide)
    logit_N = jnp.where(inside_N, (h_ND.astype(wide) * w_ND).sum(1), 0.0)
    return softcap * jnp.tanh(logit_N / softcap) if softcap else logit_N


def head_scores_reference(
    h_ND: jax.Array,
    w_VD: jax.Array,
    reference_N: jax.Array,
    softcap: float = 0.0,
    keep: str = "logits",
) -> Scores:
    """Reference implementation: sums in at least float32."""
    wide = jnp.promote_types(h_ND.dtype, jnp.float32)
    logits_NV = jnp.einsum("ND,VD->NV", h_ND, w_VD, preferred_element_type=wide)
    if softcap:
        logits_NV = softcap * jnp.tanh(logits_NV / softcap)
    e_NV = jnp.minimum(jnp.exp2((logits_NV - reference_N[:, None]) * LOG2E), MOST)
    kept = {"logits": logits_NV, "exponentials": e_NV.astype(h_ND.dtype), "": None}
    return Scores(e_NV.sum(1), kept[keep])


def head_gradients(
    exponentials_NV: jax.Array,
    h_ND: jax.Array,
    w_VD: jax.Array,
    targets_N: jax.Array,
    weight_N: jax.Array,
    unit_N: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of h and w, [N,D] and [V,D], in at least float32.

    That of the logits is weight * (exponentials / unit - onehot); with unit = total it is
    weight * (softmax - onehot). To get it, XLA changes one number of each row in place. 1 / unit is
    a factor of the rows of h and of dh. The unit is first rounded, by at most 2**-9 of itself, so
    that the changed number, the largest of its row, is exact in 16 bits.

    Args:
        exponentials_NV: from head_scores, whose references are those of the targets.
        targets_N: a target outside [0, V) has no onehot.
        weight_N, unit_N: in at least float32.
    """
    V, dtype, wide = len(w_VD), h_ND.dtype, weight_N.dtype
    own_N = (2.0**-SHIFT - unit_N).astype(dtype)
    factor_N = weight_N / (2.0**-SHIFT - own_N.astype(wide))
    columns_N = jnp.where((targets_N >= 0) & (targets_N < V), targets_N, V)
    d_NV = exponentials_NV.at[jnp.arange(len(h_ND)), columns_N].set(
        own_N, mode="drop", indices_are_sorted=True, unique_indices=True
    )
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    scaled_ND = (h_ND.astype(wide) * factor_N[:, None]).astype(dtype)
    dh_ND = product("NV,VD->ND", d_NV, w_VD) * factor_N[:, None]
    return dh_ND, product("NV,ND->VD", d_NV, scaled_ND)


def _kernel(h_ref, w_ref, reference_ref, *out_refs, tiles, softcap, keep, interpret):
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
    reference = triton.load(reference_ref.at[rows], mask=inside, other=0.0)
    e = triton.exp2(logits, LOG2E, reference[:, None], interpret)
    e = jnp.where(e > MOST, MOST, e)  # Triton's minimum would drop nan
    if keep == "exponentials":
        write(e)
    if V % tiles.columns:  # columns past V have logit 0
        e = jnp.where((columns < V)[None, :], e, 0.0)
    triton.store(out_refs[-1].at[tile, rows], e.sum(1), mask=inside)


@functools.partial(jax.jit, static_argnames=("tiles", "softcap", "keep", "interpret"))
def head_scores(
    h_ND: jax.Array,
    w_VD: jax.Array,
    reference_N: jax.Array,
    tiles: ProductTiles | MosaicProductTiles,
    softcap: float = 0.0,
    keep: str = "logits",
    interpret: bool = False,
) -> Scores:
    """Computes head_scores_reference in one product, on one device's rows and its part of V.

    Args:
        h_ND, w_VD: bfloat16, float16 or float32 (in full, not TF32).
        reference_N: float32, near each row's largest logit; see target_logits.
        tiles: its type selects the body.
        softcap: c in c*tanh(logits/c); 0 for none.
        keep: what to return for the gradient: "logits" in float32, "exponentials" in h's type,
            which must be bfloat16 or float32 as float16 has too few exponents, or "" for nothing.
        interpret: runs without a GPU, for tests.

    Raises:
        ValueError: check_head_scores refuses the arguments, or the Mosaic body.
    """
    check_head_scores(h_ND, w_VD, reference_N, tiles, softcap, keep)
    (N, _), V = h_ND.shape, w_VD.shape[0]
    dtype = h_ND.dtype if keep == "exponentials" else jnp.float32
    kept = [jax.ShapeDtypeStruct((N, V), dtype)] if keep else []
    reference_N = reference_N * LOG2E
    if isinstance(tiles, MosaicProductTiles):
        from pallas_kernels import head_scores_mosaic as mosaic  # not every JAX has Mosaic

        out = mosaic.head_scores(h_ND, w_VD, reference_N, tiles, softcap, keep, kept, interpret)
    else:
        vocabulary_tiles = pl.cdiv(V, tiles.columns)
        partial = jax.ShapeDtypeStruct((vocabulary_tiles, N), jnp.float32)
        out = triton.call(
            functools.partial(
                _kernel, tiles=tiles, softcap=softcap, keep=keep, interpret=interpret
            ),
            name="head_scores",
            grid=(pl.cdiv(N, tiles.rows) * vocabulary_tiles,),
            out_shape=[*kept, partial],
            warps=tiles.warps,
            stages=tiles.stages,
            interpret=interpret,
        )(h_ND, w_VD, reference_N)
    return Scores(out[-1].sum(0), out[0] if keep else None)

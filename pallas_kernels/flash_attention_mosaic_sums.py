"""The steps of attention's backward on Hopper, which dkv and dq share.

A multiplying warp group adds one block after another to its sums: dk and dv, or dq. The kernels in
flash_attention_mosaic_backward.py give it the rows that stay in shared memory, and the mask.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu


def positions(shape: tuple[int, ...], dim: int, first: Any) -> jax.Array:
    """Returns the positions, int32, along one dimension of a product, the first being `first`."""
    return first + plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def masked(
    factors: Sequence[jax.Array],
    key: jax.Array,
    last: jax.Array,
    window: int | None,
    docs: Sequence[jax.Array],
) -> list[jax.Array]:
    """Returns the factors with 0 where a query does not see a key.

    Args:
        key: the position of each pair's key.
        last: the last key that each pair's query may see.
        docs: (documents of the rows, documents of the columns) or ().
    """
    visible = key <= last
    if window is not None:
        visible &= key > last - window
    if docs:
        rows, columns = (lax.broadcast_in_dim(x, visible.shape, [d]) for d, x in enumerate(docs))
        visible &= rows == columns
    return [jnp.where(visible, x, 0.0) for x in factors]


def mask_if(needs_mask: Callable[[Any], Any], mask: Callable[..., list]) -> Callable[..., list]:
    """Returns a function that masks only the steps where needs_mask(step).

    Two loops, one for each kind of step, would double the code, and spilled at K=128 (audit,
    ptxas 12.9.86).
    """
    return lambda factors, step, slot: lax.cond(
        needs_mask(step), lambda *x: mask(x, step, slot), lambda *x: list(x), *factors
    )


def _add_block(
    resident,
    vectors,
    mask,
    dim,
    tiles,
    staging,
    store,
    step,
    sums,
    *,
    x_smem,
    y_smem,
    full,
    free,
    turns=None,
):
    """Adds one block to the sums: ds x to the first and, if there is a second, p y to it.

    Args:
        resident: this group's rows of (k, v) or (q, do), in shared memory.
        vectors: slot -> (minus the log-sum-exp, in units of unscaled scores, minus delta). The
            accumulators of the products start from them, which takes fewer registers than
            subtracting them afterwards.
        dim: the dimension of the scores that these vectors run along.
        mask: ([ds, p] or [ds], step, slot) -> the same with 0 where a key is not visible. Masking
            them, not the scores, keeps what is not finite from masked positions.
        store: stores (slot, ds), which the copying group moves to HBM; or None.
        turns: (barrier of this group's turn, of the other's) where they take turns.
    """
    slot, shape = lax.rem(step, tiles.stages), (resident.shape[1], x_smem.shape[1])
    scale = math.log2(math.e) * resident.shape[2] ** -0.5
    plgpu.barrier_wait(full.at[slot])
    if turns:
        plgpu.barrier_wait(turns[0])

    def products(s_ref, dp_ref):
        plgpu.wgmma(s_ref, resident.at[0], x_smem.at[slot].transpose((1, 0)))
        plgpu.wgmma(dp_ref, resident.at[1], y_smem.at[slot].transpose((1, 0)))
        if turns:
            plgpu.barrier_arrive(turns[1])

    start = [lax.broadcast_in_dim(x, shape, [dim]) for x in vectors(slot)]
    s, dp = mosaic.accumulate(products, start, staging is not None)
    p = jnp.exp2(s * scale)
    # Masked after rounding, they spilled at K=128 (audit, ptxas 12.9.86).
    factors = mask([p * dp, p][: len(sums)], step, slot)
    factors = [x.astype(resident.dtype) for x in factors]

    def add_products(*refs):
        for n, (ref, smem) in enumerate(zip(refs, (x_smem, y_smem), strict=False)):
            buffer = None if staging is None else staging.at[n]
            mosaic.multiply_registers(ref, factors[n], smem.at[slot], buffer)
        if store:  # while the products run
            store(slot, factors[0])

    sums = mosaic.accumulate(add_products, sums, staging is not None)
    plgpu.barrier_arrive(free.at[slot])
    return tuple(sums)


def read_resident(resident: Any, resident_full: Any, parts: Sequence[Any]) -> None:
    """Copies parts of arrays to the rows that stay in shared memory, and waits for them."""
    for n, part in enumerate(parts):
        plgpu.copy_gmem_to_smem(part, resident.at[n], resident_full)
    plgpu.barrier_wait(resident_full)


def sum_blocks(
    resident: Any, steps: Any, outputs: Sequence[Any], *args: Any, turn: Any = None, **pipeline: Any
) -> None:
    """Adds all blocks to sums of zero and writes each sum to its output, a part of an array.

    The first, dk or dq, gets the scores' factor 1/sqrt(K). The sums are written through the shared
    memory of the resident rows. The other arguments are _add_block's.

    Args:
        turn: barriers with one slot for each group, if the two issue products in turns, so that one
            computes probabilities while the products of the other run; else None.
    """
    group = lax.axis_index("group")
    if turn is not None:
        pipeline["turns"] = turn.at[group], turn.at[1 - group]
        pl.when(group == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))  # group 0 begins
    zero = jnp.zeros(resident.shape[1:], jnp.float32)
    zeros = tuple(plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for _ in outputs)
    add_block = functools.partial(_add_block, resident, *args, **pipeline)
    first, *rest = lax.fori_loop(0, steps, add_block, zeros)
    if turn is not None:  # all arrivals must be waited for
        pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
    for n, x in enumerate((first * resident.shape[2] ** -0.5, *rest)):
        resident.at[n][...] = x.astype(resident.dtype)
    plgpu.commit_smem()
    for n, part in enumerate(outputs):
        plgpu.copy_smem_to_gmem(resident.at[n], part)
    plgpu.wait_smem_to_gmem(0)

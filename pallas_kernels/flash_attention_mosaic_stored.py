"""dq on Hopper from scores' gradients that the kernel of dk and dv has stored: one product, ds k.

The two kernels then make five products where dkv and dq of flash_attention_mosaic_backward.py make
seven, and compute each probability once. The price is memory: an array [B,H,S,T] of q's type, of
which the causal half is written and read. The writes overlap with dkv's products, so they cost
little time; this kernel is limited by the reads.

ds is stored as dkv computes it, [keys, queries]; the tensor core transposes it as it reads. Only
blocks that dkv visits are written. Each multiplying warp group therefore stops at the last block of
keys that its own queries see, and dkv rounds the queries that it visits to such groups of queries.

Bound: memory, B*H*T*(2*S-T+1) bytes of ds. FLOPs: 0.5 times the forward's.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import attention_steps, flash_attention_mosaic_backward, mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tiles import FlashAttentionTiles, MosaicAttentionTiles


def _kernel(
    ds_ref, k_ref, dq_ref, *, tiles, ratio, window, interpret, ds_smem, k_smem, dq_smem, full, free
):
    T, S = dq_ref.shape[1], k_ref.shape[1]
    group, head, batch = (lax.axis_index(name) for name in ("group", "head", "batch"))
    block = lax.axis_size("block") - 1 - lax.axis_index("block")  # the longest first
    start, size = block * tiles.queries, tiles.queries // mosaic.CONSUMERS
    steps = attention_steps.key_steps(start, tiles, T, S, window)

    def copies(j):
        keys = pl.ds((steps.first + j) * tiles.keys, tiles.keys)
        for g in range(mosaic.CONSUMERS):
            yield ds_ref.at[batch, head, keys, pl.ds(start + g * size, size)], ds_smem.at[g]
        yield k_ref.at[batch, keys, lax.div(head, ratio)], k_smem

    @pl.when(group == mosaic.CONSUMERS)
    def _copy():
        plgpu.set_max_registers(mosaic.COPYING_REGISTERS, action="decrease")
        mosaic.copy_steps(steps.count, tiles.stages, [(copies, full, free)])

    @pl.when(group < mosaic.CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(mosaic.MULTIPLYING_REGISTERS, action="increase")
        first_row = start + group * size

        def add_block(j, dq):
            slot = lax.rem(j, tiles.stages)
            plgpu.barrier_wait(full.at[slot])
            ds = ds_smem.at[group, slot].transpose((1, 0))
            product = lambda ref: plgpu.wgmma(ref, ds, k_smem.at[slot])
            (dq,) = mosaic.accumulate(product, [dq], interpret)
            plgpu.barrier_arrive(free.at[slot])
            return dq

        def skip_block(j):  # which only the other group sees
            slot = lax.rem(j, tiles.stages)
            plgpu.barrier_wait(full.at[slot])
            plgpu.barrier_arrive(free.at[slot])

        zero = plgpu.layout_cast(jnp.zeros(dq_smem.shape[1:], jnp.float32), plgpu.Layout.WGMMA)
        own = attention_steps.key_steps(first_row, tiles._replace(queries=size), T, S, window)
        begin = own.first - steps.first
        # A group that sees nothing must read nothing: dkv has not written there.
        end = jnp.where(first_row + size + S - T > 0, begin + own.count, begin)
        if window is not None:
            pl.loop(0, begin)(skip_block)
        dq = lax.fori_loop(begin, end, add_block, zero)
        pl.loop(end, steps.count)(skip_block)
        out = dq_smem.at[group]
        out[...] = (dq * out.shape[1] ** -0.5).astype(dq_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, dq_ref.at[batch, pl.ds(first_row, size), head])
        plgpu.wait_smem_to_gmem(0)


def gradients(
    arguments: Sequence[jax.Array],
    blocks: FlashAttentionTiles,
    interpret: bool,
    window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (dq_BTHK, dk_BSGK, dv_BSGK).

    Args:
        arguments: q, k, v, do, log-sum-exp, delta, and the documents of queries and keys or none.
        blocks: those of dkv must be of a Mosaic body.
    """
    q, k = arguments[:2]
    assert isinstance(blocks.dq, MosaicAttentionTiles)  # check_attention has checked both
    assert isinstance(blocks.dkv, MosaicAttentionTiles)
    group = blocks.dq.queries // mosaic.CONSUMERS
    dk, dv, ds = flash_attention_mosaic_backward.dkv(
        arguments, blocks.dkv, interpret, window, group
    )
    return dq_from_stored(ds, q, k, blocks.dq, interpret, window), dk, dv


def dq_from_stored(
    ds_BHST: jax.Array,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    tiles: MosaicAttentionTiles,
    interpret: bool,
    window: int | None,
) -> jax.Array:
    """Returns dq_BTHK.

    Args:
        ds_BHST: the scores' gradients as flash_attention_mosaic_backward.dkv stores them; S and T
            are padded.
        q_BTHK: only its shape and type matter.
        tiles: queries must be a multiple of 128, keys of 64.
    """
    (_, T, H, K), G = q_BTHK.shape, k_BSGK.shape[2]
    groups, size = mosaic.CONSUMERS, tiles.queries // mosaic.CONSUMERS
    memory = functools.partial(mosaic.swizzled_shared_memory, dtype=q_BTHK.dtype)
    scratch = {
        "ds_smem": memory((groups, tiles.stages, tiles.keys, size)),
        "k_smem": memory((tiles.stages, tiles.keys, K)),
        "dq_smem": memory((groups, size, K)),
        "full": plgpu.Barrier(num_arrivals=groups + 1, num_barriers=tiles.stages),
        "free": plgpu.Barrier(num_arrivals=groups, num_barriers=tiles.stages),
    }
    kernel = functools.partial(
        _kernel, tiles=tiles, ratio=H // G, window=window, interpret=interpret
    )
    return mosaic.call(
        kernel,
        name="flash_attention_dq_stored",
        grid={"head": H, "block": pl.cdiv(T, tiles.queries), "batch": len(q_BTHK)},
        out_shape=jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype),
        scratch=scratch,
        interpret=interpret,
    )(ds_BHST, k_BSGK)

"""Computes x y^T tile by tile on Hopper, with the caller's epilogue for each finished tile.

All Mosaic kernels that are plain products share this body. Programs are persistent: each works
through every step-th tile. Its copying warp group always has up to `stages` slices of both operands
in flight, also those of the next tile while the epilogue of the last one runs. The two multiplying
warp groups compute one half of a tile's rows each.

Source: warp specialisation as in CUTLASS' sm_90 kernels,
https://github.com/NVIDIA/cutlass/blob/main/media/docs/cpp/efficient_gemm.md
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu
from pallas_kernels.tiles import MosaicProductTiles


def pipeline_scratch(tiles: MosaicProductTiles, dtype: Any) -> dict[str, Any]:
    """Returns the shared memory and barriers that run_products needs, as `scratch` of mosaic.call.

    `full` counts the two TMA copies into a slot, `free` the two warp groups that have read it.
    """
    x_shape = tiles.stages, tiles.rows, tiles.depth
    y_shape = tiles.stages, tiles.columns, tiles.depth
    return {
        "x_smem": mosaic.swizzled_shared_memory(x_shape, dtype),
        "y_smem": mosaic.swizzled_shared_memory(y_shape, dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "free": plgpu.Barrier(num_arrivals=mosaic.CONSUMERS, num_barriers=tiles.stages),
    }


def run_products(
    tiles: MosaicProductTiles,
    count: int,
    slices: int,
    operands: Callable,
    before: Callable,
    after: Callable,
    **pipeline: Any,
) -> None:
    """Runs the whole kernel; every warp group calls it.

    Args:
        count: tiles of all programs together.
        slices: slices of depth that make a tile.
        operands: tile p -> ((x_ref [M,N], block of its rows), (y_ref, block of its rows)).
        before: called with p by each multiplying group before it starts on tile p.
        after: the epilogue, called with p and the group's half of the tile, sum_RC in float32.
        pipeline: the refs of pipeline_scratch.
    """
    first, step = lax.axis_index("program"), lax.axis_size("program")
    own_tiles = lax.div(count - first + step - 1, step)
    group = lax.axis_index("group")

    @pl.when(group == mosaic.CONSUMERS)
    def _copy():
        plgpu.set_max_registers(mosaic.COPYING_REGISTERS, action="decrease")
        _copy_all(tiles, own_tiles, slices, lambda i: operands(first + i * step), **pipeline)

    @pl.when(group < mosaic.CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(mosaic.MULTIPLYING_REGISTERS, action="increase")

        @pl.loop(0, own_tiles)
        def _multiply_tile(i):
            p = first + i * step
            before(p)
            after(p, _multiply_tile_half(tiles, group, i * slices, slices, **pipeline))

        plgpu.wait_smem_to_gmem(0)  # shared memory must live until the last copy out of it is done


def _copy_all(tiles, own_tiles, slices, operands, *, x_smem, y_smem, full, free):
    @pl.loop(0, own_tiles)
    def _copy_tile(i):
        (x_ref, x_block), (y_ref, y_block) = operands(i)

        @pl.loop(0, slices)
        def _copy_slice(k):
            copied = i * slices + k
            slot, depth = lax.rem(copied, tiles.stages), pl.ds(k * tiles.depth, tiles.depth)

            @pl.when(copied >= tiles.stages)  # before that the slot has never been filled
            def _():
                plgpu.barrier_wait(free.at[slot])

            for ref, rows, smem in (
                (x_ref, pl.ds(x_block * tiles.rows, tiles.rows), x_smem),
                (y_ref, pl.ds(y_block * tiles.columns, tiles.columns), y_smem),
            ):
                plgpu.copy_gmem_to_smem(ref.at[rows, depth], smem.at[slot], full.at[slot])

    # A barrier must not have arrivals that nobody waited for when the program ends.
    @pl.loop(0, jnp.minimum(own_tiles * slices, tiles.stages))
    def _wait_for_the_last_reads(slot):
        plgpu.barrier_wait(free.at[slot])


def _multiply_tile_half(tiles, group, start, slices, *, x_smem, y_smem, full, free):
    """Returns this group's half of a tile whose first slice is the program's slice `start`."""
    half = tiles.rows // mosaic.CONSUMERS

    def multiply_slices(sum_ref):
        @pl.loop(0, slices)
        def _multiply_slice(k):
            slot = lax.rem(start + k, tiles.stages)
            plgpu.barrier_wait(full.at[slot])
            x, y = x_smem.at[slot, pl.ds(group * half, half)], y_smem.at[slot]
            plgpu.wgmma(sum_ref, x, y.transpose((1, 0)))
            # wgmma is asynchronous: once at most one is in flight, the last one has read its slot.
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(start + k - 1, tiles.stages)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[lax.rem(start + slices - 1, tiles.stages)])
        return sum_ref[...]

    return pl.run_scoped(multiply_slices, plgpu.ACC((half, tiles.columns), jnp.float32))

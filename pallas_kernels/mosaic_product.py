"""Computes x y^T tile by tile on Hopper, with the caller's epilogue for each finished tile.

The bodies of head_scores and symmetric share this code. Programs are persistent: of P programs,
each computes every P-th tile. Its copying warp group has up to `stages` slices of both operands in
flight; while the epilogue of one tile runs, it already copies slices of the next. The two
multiplying warp groups compute half of a tile's rows each. The programs of a cluster multiply other
rows of x by the same rows of y, of which each copies a part to all.

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

    `full` waits for the two TMA copies into a slot, `free` for the two warp groups that read it.
    """
    x_shape = tiles.stages, tiles.rows, tiles.depth
    y_shape = tiles.stages, tiles.columns, tiles.depth
    return {
        "x_smem": mosaic.swizzled_shared_memory(x_shape, dtype),
        "y_smem": mosaic.swizzled_shared_memory(y_shape, dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "free": mosaic.shared_barrier(tiles.cluster, mosaic.CONSUMERS, tiles.stages),
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
    """Runs all warp groups of a program; it is the body of a kernel.

    Args:
        count: tiles of all clusters together.
        slices: slices along the depth of one tile.
        operands: tile p -> ((x_ref [M,N], block of its rows), (y_ref, block of its rows)).
        before: each multiplying group calls it with p before it starts on tile p.
        after: the epilogue; each group calls it with p and its half of the tile, sum_RC in float32.
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

        plgpu.wait_smem_to_gmem(0)  # the program must not end before its last copy to HBM


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

            x, y = (
                pl.ds(x_block * tiles.rows, tiles.rows),
                pl.ds(y_block * tiles.columns, tiles.columns),
            )
            plgpu.copy_gmem_to_smem(x_ref.at[x, depth], x_smem.at[slot], full.at[slot])
            mosaic.copy_to_cluster(
                tiles.cluster, y_ref.at[y, depth], y_smem.at[slot], full.at[slot]
            )

    # When a program ends, every arrival at a barrier must have been waited for.
    @pl.loop(0, jnp.minimum(own_tiles * slices, tiles.stages))
    def _wait_for_the_last_reads(slot):
        plgpu.barrier_wait(free.at[slot])


def _multiply_tile_half(tiles, group, start, slices, *, x_smem, y_smem, full, free):
    """Returns this group's half of a tile; `start` counts the program's slices before the tile."""
    half = tiles.rows // mosaic.CONSUMERS

    def multiply_slices(sum_ref):
        @pl.loop(0, slices)
        def _multiply_slice(k):
            slot = lax.rem(start + k, tiles.stages)
            plgpu.barrier_wait(full.at[slot])
            x, y = x_smem.at[slot, pl.ds(group * half, half)], y_smem.at[slot]
            plgpu.wgmma(sum_ref, x, y.transpose((1, 0)))
            # wgmma is asynchronous. With at most one in flight, the previous one has read its slot.
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(start + k - 1, tiles.stages)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[lax.rem(start + slices - 1, tiles.stages)])
        return sum_ref[...]

    return pl.run_scoped(multiply_slices, plgpu.ACC((half, tiles.columns), jnp.float32))

"""x y^T tile by tile on Hopper, with the caller's epilogue: what all products of Mosaic's share.

A program works through its share of the tiles. Its copying warp group keeps `stages` slices of both
operands on their way, those of the next tile too while the last is being finished; two warp groups
multiply, each half of a tile's rows. A slot of shared memory is filled again once both have read
it.

Source: warp specialisation as in CUTLASS' sm_90 kernels,
https://github.com/NVIDIA/cutlass/blob/main/media/docs/cpp/efficient_gemm.md
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu


def pipeline_scratch(tiles, dtype) -> dict:
    """What run_products needs of `scratch`."""
    return {
        "x_smem": mosaic.shared((tiles.stages, tiles.rows, tiles.depth), dtype),
        "y_smem": mosaic.shared((tiles.stages, tiles.columns, tiles.depth), dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "free": plgpu.Barrier(num_arrivals=mosaic.CONSUMERS, num_barriers=tiles.stages),
    }


def run_products(tiles, count, turns, operands, before, after, **pipeline):
    """The whole kernel's body, in every warp group.

    Args:
        tiles: a MosaicProductTiles.
        count: tiles of all programs together.
        turns: slices of depth that make a tile.
        operands: p -> ((x_ref [M,N], block of rows), (y_ref, block of its rows)) of tile p.
        before: p -> None, called by each multiplying group before it takes up tile p.
        after: (p, sum_RC) -> None, with the group's half of the tile, float32.
        pipeline: pipeline_scratch's, as refs.
    """
    first, step = lax.axis_index("program"), lax.axis_size("program")
    mine = lax.div(count - first + step - 1, step)
    group = lax.axis_index("group")

    @pl.when(group == mosaic.CONSUMERS)
    def _copy():
        plgpu.set_max_registers(mosaic.COPYING_REGISTERS, action="decrease")
        _copy_all(tiles, mine, turns, lambda turn: operands(first + turn * step), **pipeline)

    @pl.when(group < mosaic.CONSUMERS)
    def _multiply():
        plgpu.set_max_registers(mosaic.MULTIPLYING_REGISTERS, action="increase")

        @pl.loop(0, mine)
        def _tile(turn):
            p = first + turn * step
            before(p)
            after(p, _one_tile(tiles, group, turn * turns, turns, **pipeline))

        plgpu.wait_smem_to_gmem(0)


def _copy_all(tiles, mine, turns, operands, *, x_smem, y_smem, full, free):
    @pl.loop(0, mine)
    def _tile(turn):
        (x_ref, i), (y_ref, j) = operands(turn)

        @pl.loop(0, turns)
        def _slice(k):
            at = turn * turns + k
            slot, depth = lax.rem(at, tiles.stages), pl.ds(k * tiles.depth, tiles.depth)

            @pl.when(at >= tiles.stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            for ref, rows, smem in (
                (x_ref, pl.ds(i * tiles.rows, tiles.rows), x_smem),
                (y_ref, pl.ds(j * tiles.columns, tiles.columns), y_smem),
            ):
                plgpu.copy_gmem_to_smem(ref.at[rows, depth], smem.at[slot], full.at[slot])

    @pl.loop(0, jnp.minimum(mine * turns, tiles.stages))
    def _to_the_end(slot):
        plgpu.barrier_wait(free.at[slot])


def _one_tile(tiles, group, start, turns, *, x_smem, y_smem, full, free):
    half = tiles.rows // mosaic.CONSUMERS

    def run(sum_ref):
        @pl.loop(0, turns)
        def _slice(k):
            slot = lax.rem(start + k, tiles.stages)
            plgpu.barrier_wait(full.at[slot])
            x, y = x_smem.at[slot, pl.ds(group * half, half)], y_smem.at[slot]
            plgpu.wgmma(sum_ref, x, y.transpose((1, 0)))
            plgpu.wgmma_wait(1)  # the product before this one is done: its slot is free

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(start + k - 1, tiles.stages)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[lax.rem(start + turns - 1, tiles.stages)])
        return sum_ref[...]

    return pl.run_scoped(run, plgpu.ACC((half, tiles.columns), jnp.float32))

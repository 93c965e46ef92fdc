"""Sizes of the blocks of the kernels that memory bandwidth limits: GELU's and the norm's.

Those of the norm were chosen without a GPU, like those of tiles.py. This file does not import
Pallas.
"""

from typing import NamedTuple


class BlockTiles(NamedTuple):
    """Sizes of the blocks of rows and columns of a kernel that memory bandwidth limits."""

    rows: int  # of a block; a block of fewer columns has more rows, but not in the norm's kernels
    columns: int  # of the norm: of each of the parts of a row, all of which a program computes
    warps: int  # per program
    programs: int = 0  # along the rows, each for several blocks; 0: one for each block


# A thread loads 16 bytes at a time, and several times before it computes; the same on each GPU.
# The fastest of six on an H200, 32,768 x 3,072 (2026-11-28): 110 us forward, 175 us backward.
GELU_TILES = {"gelu": BlockTiles(4, 1_024, 4), "gelu_backward": BlockTiles(4, 1_024, 8, 512)}
MULTIPROCESSORS = {"sm_86": 84, "sm_90": 132}  # of an A40 and an RTX A6000; of an H100 and an H200


def norm_tiles(D: int, arch: str = "sm_90") -> dict[str, BlockTiles]:
    """Returns the default tiles of the norm's kernels for rows of D elements.

    A thread has 8 columns of each part of a row: of up to 4 parts in the forward, and of up to 3 in
    the backward, which sums three gradients for each column. Nothing spills then (audit). The
    backward has as many programs as fit on the GPU at once, at 128 to 199 registers a thread.
    """

    def sizes(most_parts):
        columns = next((c for c in (256, 512, 1_024, 2_048, 4_096) if c * most_parts >= D), 8_192)
        warps = max(4, columns // 256)
        return BlockTiles(256 * warps // columns, columns, warps)

    backward = sizes(3)
    if 2 * backward.columns >= D:
        resident_warps = 16 if backward.columns != 512 else 12
    else:
        resident_warps = 12 if backward.columns == 256 and arch == "sm_90" else 8
    programs = MULTIPROCESSORS[arch] * max(resident_warps // backward.warps, 1)
    return {"norm": sizes(4), "norm_backward": backward._replace(programs=programs)}

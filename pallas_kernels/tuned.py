"""Block sizes of kernels by compute capability; no Pallas in here, which costs a start 0.1 s.

Those of attention spill at no head width of 64 and 128, with documents or without (audit). They
were chosen offline, no card has run them; FlashAttention-2 too takes 64x64 for the backward where
shared memory is short.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
    """Queries and keys of a block, warps of a program, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    forward: Tiles
    dkv: Tiles
    dq: Tiles


BLOCKS = {
    "sm_86": Blocks(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    "sm_90": Blocks(Tiles(128, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(128, 64, 8, 2)),
}

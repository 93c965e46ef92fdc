"""Block sizes of kernels by compute capability; no Pallas in here, which costs a start 0.1 s.

They were chosen offline as the largest that do not spill (audit); a card's own rows, which
`python -m pallas_kernels.bench` writes to tuned/, come before them.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
    """Of attention: queries and keys of a block, warps of a program, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """FlashAttention-2 too takes 64x64 for the backward where shared memory is short."""

    forward: Tiles
    dkv: Tiles
    dq: Tiles


class ProductTiles(NamedTuple):
    """Of a matrix product: a program's tile, the depth of a turn, row blocks that walk together."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8


class MosaicTiles(NamedTuple):
    """Of a product's Mosaic body: a program's tile, the depth of a turn, turns on their way."""

    rows: int
    columns: int
    depth: int
    stages: int
    group: int = 8  # row blocks that walk together
    body: str = "mosaic"  # tells them apart where they are written as lists


class MosaicBlock(NamedTuple):
    """Of attention's Mosaic body: a program's queries, keys of a step, steps on their way."""

    queries: int
    keys: int
    stages: int
    body: str = "mosaic"


def body_of(tiles) -> str:
    """Which body one kernel's tiles are for."""
    return getattr(tiles, "body", "triton")


TILES = {
    "sm_86": {
        "attention": Blocks(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
        "head": ProductTiles(128, 128, 32, 4, 3),
        "square": ProductTiles(128, 128, 32, 4, 3),
        "square_sum": ProductTiles(128, 128, 32, 8, 3),
    },
    "sm_90": {
        "attention": Blocks(Tiles(128, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(128, 64, 8, 2)),
        "head": ProductTiles(128, 256, 64, 8, 3),
        "square": ProductTiles(128, 128, 64, 8, 3),
        "square_sum": ProductTiles(128, 128, 64, 8, 3),
    },
}

# op -> kernel -> tiles of its Mosaic body; as many stages as fit
MOSAIC = {
    "sm_90": {
        "attention": {
            "forward": MosaicBlock(128, 128, 2),
            "dkv": MosaicBlock(64, 128, 3),
            "dq": MosaicBlock(128, 64, 3),
        },
        "head": {"head": MosaicTiles(128, 256, 64, 4)},
        "square": {
            "square": MosaicTiles(256, 128, 64, 3),
            "square_sum": MosaicTiles(256, 128, 64, 3),
        },
    },
}

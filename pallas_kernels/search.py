"""The tiles that are worth trying, by op; the audit drops those that spill (--sweep)."""

import itertools

from pallas_kernels import mosaic
from pallas_kernels.routes import default_tiles, mosaic_tiles, with_part
from pallas_kernels.tuned import MOSAIC, Blocks, MosaicBlock, MosaicTiles, ProductTiles, Tiles


def _attention(part):
    del part
    sides = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    return itertools.starmap(Tiles, sides)


def _mosaic_attention(part):
    """What a multiplying warp group holds in registers bounds it: half of a block's rows."""
    queries, keys = {
        "forward": ((128, 256), (64, 128)),
        "dkv": ((64,), (128,)),
        "dq": ((128,), (64, 128)),
    }[part]
    yield from itertools.starmap(MosaicBlock, itertools.product(queries, keys, (2, 3, 4)))


def _products(part):
    square = part.startswith("square")
    for rows, columns, depth, warps, stages in itertools.product(
        (64, 128), (64, 128) if square else (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)
    ):
        if rows == columns or not square:
            yield ProductTiles(rows, columns, depth, warps, stages)


def _mosaic_products(part):
    """Half of a tile's rows is a warp group's: 128 float32 sums a thread at most."""
    square = part.startswith("square")
    for rows, columns, depth, stages in itertools.product(
        (128, 256), (64, 128, 256), (64, 128), (2, 3, 4, 5, 6)
    ):
        fits = columns in (rows // 2, rows) or not square
        if fits and rows // 2 * columns <= 128 * 128:
            yield MosaicTiles(rows, columns, depth, stages)


# op -> ({body: tiles of one of its kernels}, its kernels); others' one number follows from D or K
SPACES = {
    "attention": ({"triton": _attention, "mosaic": _mosaic_attention}, Blocks._fields),
    "norm": ({}, ()),
    "qk_rope": ({}, ()),
    "head": ({"triton": _products, "mosaic": _mosaic_products}, ("head",)),
    "square": ({"triton": _products, "mosaic": _mosaic_products}, ("square", "square_sum")),
}


def bodies(op, arch) -> list:
    """All of the op's tiles as they are before a search, for each body that it has here."""
    usable = mosaic.USABLE and op in MOSAIC.get(arch, {})
    return [default_tiles(op, arch)] + [mosaic_tiles(op, arch)] * usable


def candidates(op, arch):
    """(which kernel's tiles are changed, all of the op's as `routes.Choice` has them), each.

    One kernel's tiles are changed at a time: separate searches, not their product.
    """
    spaces, parts = SPACES[op]
    has_mosaic = len(bodies(op, arch)) > 1
    for body, space in spaces.items():
        if body == "mosaic" and not has_mosaic:
            continue
        for part in parts:
            for tiles in space(part):
                yield part, with_part(default_tiles(op, arch), part, tiles)

"""The tiles that are worth trying, by op; the audit drops those that spill (--sweep)."""

import itertools

from pallas_kernels.tuned import TILES, Blocks, ProductTiles, Tiles


def _attention(arch):
    """One kernel's tiles changed at a time: three searches, not their product."""
    base = TILES[arch]["attention"]
    sides = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    for part, tiles in itertools.product(Blocks._fields, itertools.starmap(Tiles, sides)):
        yield part, base._replace(**{part: tiles})


def _products(names, square):
    def found(arch):
        sides = (64, 128) if square else (64, 128, 256)
        for rows, columns, depth, warps, stages in itertools.product(
            (64, 128), sides, (32, 64), (4, 8), (2, 3, 4)
        ):
            if rows == columns or not square:
                tiles = ProductTiles(rows, columns, depth, warps, stages)
                for name in names:
                    yield name, {n: TILES[arch][n] for n in names} | {name: tiles}

    return found


SPACES = {
    "attention": _attention,
    "norm": lambda arch: iter(()),  # its one number, elements a warp, follows from D
    "qk_rope": lambda arch: iter(()),  # and here from K
    "head": _products(("head",), square=False),
    "square": _products(("square", "square_sum"), square=True),
}


def candidates(op, arch):
    """(which kernel's tiles are changed, all of the op's as `routes.Choice` has them), each."""
    return SPACES[op](arch)

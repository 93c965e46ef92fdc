"""Whether an op's kernel is the faster one, on this chip at this shape: by measured rows alone.

`python -m pallas_kernels.bench` writes the rows, tuned/CHIP.json. No Pallas in here.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax

from pallas_kernels.tuned import (
    MOSAIC,
    TILES,
    Blocks,
    MosaicBlock,
    MosaicTiles,
    ProductTiles,
    Tiles,
    body_of,
)

OPS = ("attention", "norm", "qk_rope", "head", "square")
ROWS = Path(__file__).parent / "tuned"
NEAR = 0.5  # of a factor of two: a row speaks for sizes that round to its own


class Row(NamedTuple):
    """One measurement: the kernel at its best tiles, beside the fastest of all others."""

    op: str
    chip: str
    dtype: str
    shape: tuple  # attention: T, H, G, K; norm and square: D; qk_rope: K; head: D, V
    jax: str
    tiles: tuple | None
    kernel_s: float
    other: str  # what else was fastest
    other_s: float
    date: str
    command: str

    def speaks_for(self, op, chip, dtype, shape) -> bool:
        same = (self.op, self.chip, self.dtype) == (op, chip, dtype)
        if not same or len(shape) != len(self.shape) or not _alike(self.jax, jax.__version__):
            return False
        return all(abs(math.log2(a / b)) <= NEAR for a, b in zip(shape, self.shape, strict=True))


class Choice(NamedTuple):
    tiles: tuple | None  # of TILES, or a row's
    faster: bool
    reason: str


def _alike(a, b) -> bool:
    """Versions of one minor series: their compilers are the same but for fixes."""
    return a.split(".")[:2] == b.split(".")[:2]


def _tiles(op, value):
    if value is None:
        return None
    if op == "attention":
        kinds = {"mosaic": MosaicBlock}
        return Blocks(*(kinds.get(tiles[-1], Tiles)(*tiles) for tiles in value))
    kinds = {"mosaic": MosaicTiles}
    return {name: kinds.get(tiles[-1], ProductTiles)(*tiles) for name, tiles in value.items()}


@functools.cache
def read_rows(folder=ROWS) -> list[Row]:
    """All measured rows.

    Raises:
        ValueError: a file is not what bench writes.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            for row in map(lambda values: Row(**values), json.loads(path.read_text())):
                rows.append(row._replace(shape=tuple(row.shape), tiles=_tiles(row.op, row.tiles)))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must hold rows of the bench; got {error!r}.") from error
    return rows


def default_tiles(op, arch):
    """Those chosen offline: Blocks of attention, {name: ProductTiles} of head and square."""
    table = TILES[arch]
    if op == "attention":
        return table[op]
    return {name: tiles for name, tiles in table.items() if name.startswith(op)} or None


def _mosaic_rows(op, tiles, shape):
    """The lengths of arrays' rows that a Mosaic body among them would copy; of Triton's nothing."""
    if tiles is None or all(body_of(part) == "triton" for part in _parts(tiles)):
        return ()
    return shape[3:] if op == "attention" else shape


def _parts(tiles):
    return tiles.values() if isinstance(tiles, dict) else tiles


def with_part(tiles, part, value):
    """An op's tiles with those of one of its kernels changed."""
    return tiles | {part: value} if isinstance(tiles, dict) else tiles._replace(**{part: value})


def part_of(tiles, part):
    return tiles[part] if isinstance(tiles, dict) else getattr(tiles, part)


def mosaic_tiles(op, arch):
    """default_tiles with those of the Mosaic bodies where there are; None where there is none."""
    tiles, found = default_tiles(op, arch), MOSAIC.get(arch, {}).get(op, {})
    for part, value in found.items():
        tiles = with_part(tiles, part, value)
    return tiles if found else None


def choose(op, arch, chip, dtype, shape, folder=ROWS) -> Choice:
    """The tiles of an op's kernel, and whether a card has found it faster.

    Args:
        op: one of OPS.
        arch: a key of TILES.
        chip: its name in the chip table, or "".
        dtype: a name, as "bfloat16".
        shape: as in Row.
    """
    found = [row for row in read_rows(folder) if row.speaks_for(op, chip, dtype, shape)]
    if not found:
        why = f"its kernel is not measured on {chip or arch} at this shape"
        return Choice(default_tiles(op, arch), False, why)
    row = found[-1]
    if (sizes := _mosaic_rows(op, row.tiles, shape)) and any(size % 8 for size in sizes):
        why = f"its fastest body takes sizes of a multiple of 8; got {', '.join(map(str, sizes))}"
        return Choice(default_tiles(op, arch), False, why)
    ratio = row.kernel_s / row.other_s
    reason = f"{ratio:.2f} times the time of {row.other} on {chip}, {row.date}"
    return Choice(row.tiles, ratio < 1, reason)

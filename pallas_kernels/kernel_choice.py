"""Chooses the tiles of an op's kernels and reports whether measurements show that they are faster.

The measurements are in pallas_kernels/tuned/CHIP.json, which `python -m pallas_kernels.bench
--save` writes. A kernel that was not measured on this chip, at this type and shape, does not count
as faster. jaxtrain/ops/routes.py decides whether a run uses it. This file imports no Pallas.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax

from pallas_kernels.tiles import (
    AttentionTiles,
    FlashAttentionTiles,
    MosaicAttentionTiles,
    MosaicProductTiles,
    OpTiles,
    ProductTiles,
    body_of,
    default_tiles,
)

OPS = ("attention", "norm", "qk_rope", "head", "square")
TUNED = Path(__file__).parent / "tuned"
NEAR = 0.5  # a row applies to sizes within a factor of 2**0.5 of its own


class BenchRow(NamedTuple):
    """One measurement: the kernel at its best tiles, and the fastest other implementation."""

    op: str
    chip: str
    dtype: str
    shape: tuple  # attention: T, H, G, K; norm and square: D; qk_rope: K; head: D, V
    jax: str
    tiles: OpTiles | None
    kernel_s: float
    other: str  # the fastest other implementation
    other_s: float
    date: str
    command: str

    def applies_to(self, op: str, chip: str, dtype: str, shape: tuple) -> bool:
        """Returns whether this row has the op, chip and type, and a similar shape and JAX."""
        same = (self.op, self.chip, self.dtype) == (op, chip, dtype)
        # Within one minor series, JAX's compilers differ only by fixes.
        same_jax = self.jax.split(".")[:2] == jax.__version__.split(".")[:2]
        if not (same and same_jax) or len(shape) != len(self.shape):
            return False
        return all(abs(math.log2(a / b)) <= NEAR for a, b in zip(shape, self.shape, strict=True))


class BodyChoice(NamedTuple):
    """The tiles to use, whose types select each kernel's body, and whether the kernel is faster."""

    tiles: OpTiles | None
    faster: bool
    reason: str


def _tiles_from_json(op, value):
    if value is None:
        return None
    if op == "attention":
        kind_of = lambda body: MosaicAttentionTiles if body == "mosaic" else AttentionTiles
        return FlashAttentionTiles(*(kind_of(tiles[-1])(*tiles) for tiles in value))
    kind_of = lambda body: MosaicProductTiles if body == "mosaic" else ProductTiles
    return {name: kind_of(tiles[-1])(*tiles) for name, tiles in value.items()}


@functools.cache
def read_rows(folder: Path = TUNED) -> list[BenchRow]:
    """Returns the rows of all chips.

    Raises:
        ValueError: a file does not have the format that bench writes.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            for values in json.loads(path.read_text()):
                row = BenchRow(**values)
                tiles = _tiles_from_json(row.op, row.tiles)
                rows.append(row._replace(shape=tuple(row.shape), tiles=tiles))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must contain rows of the bench; got {error!r}.") from error
    return rows


def _mosaic_row_sizes(op, tiles, shape):
    """Returns the sizes that a Mosaic body needs to be multiples of 64; none without such a body."""
    kernels = tiles.values() if isinstance(tiles, dict) else tiles or ()
    if all(body_of(kernel) == "triton" for kernel in kernels):
        return ()
    return shape[3:] if op == "attention" else shape


def choose_body(
    op: str, arch: str, chip: str, dtype: str, shape: tuple, folder: Path = TUNED
) -> BodyChoice:
    """Returns the tiles of an op's kernels, and whether they were measured to be faster.

    Args:
        op: one of OPS.
        arch: a key of TILES.
        chip: a name of the chip table, or "" for a GPU that is not in it.
        dtype: a name, such as "bfloat16".
        shape: as in BenchRow.
    """
    rows = [row for row in read_rows(folder) if row.applies_to(op, chip, dtype, shape)]
    if not rows:
        reason = f"its kernel was not measured on {chip or arch} at this shape"
        return BodyChoice(default_tiles(op, arch), False, reason)
    row = rows[-1]
    sizes = _mosaic_row_sizes(op, row.tiles, shape)
    if any(size % 64 for size in sizes):
        got = ", ".join(map(str, sizes))
        reason = f"its fastest body needs sizes that are a multiple of 64; got {got}"
        return BodyChoice(default_tiles(op, arch), False, reason)
    ratio = row.kernel_s / row.other_s
    reason = f"{ratio:.2f} times the time of {row.other} on {chip}, {row.date}"
    return BodyChoice(row.tiles, ratio < 1, reason)

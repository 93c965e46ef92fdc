"""Chooses the tiles of an op's kernels and reports whether measurements show that they are faster.

The measurements are in pallas_kernels/tuned/CHIP.json, which `python -m pallas_kernels.bench
--save` writes. A kernel that was not measured on this chip, at this type and shape, does not count
as faster. jaxtrain/ops/routes.py decides whether a run uses it. This file imports no Pallas.
"""

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.chip import CHIPS
from pallas_kernels.ptxas import explain_missing_mosaic, has_triton
from pallas_kernels.tiles import (
    MOSAIC_FIRST,
    MOSAIC_HEADS,
    MOSAIC_TYPES,
    FlashAttentionTiles,
    OpTiles,
    body_of,
    default_tiles,
    describe_tiles,
    has_mask_registers,
    is_triton,
    kernel_tiles,
    kinds_of,
    mosaic_tiles,
    replace_tiles,
)

# op -> the letters of the sizes in a BenchRow's shape
SHAPES = dict(attention="BTHGK", norm="D", qk_rope="K", gelu="F", head="DV", square="D")
OPS = tuple(SHAPES)
TUNED = Path(__file__).parent / "tuned"
NEAR = 0.5  # a row applies to sizes within a factor of 2**0.5 of its own
# A chip without a row takes that of one with the same multiprocessors. On an H200 the contests of
# attention, head and square had the winners that they have on an H100.
TWINS = {"h200": "h100", "gh200": "h100", "gh200_144gb": "h100"}
QUERIES = 128  # in a block of attention; a multiprocessor works on at least one block


class BenchRow(NamedTuple):
    """One measurement: the kernel at its best tiles, and the fastest other implementation."""

    op: str
    chip: str
    dtype: str
    shape: tuple  # as in SHAPES
    jax: str
    tiles: OpTiles | None
    kernel_s: float
    other: str  # the fastest other implementation
    other_s: float
    date: str
    command: str
    documents: bool = False  # attention was masked between documents
    window: int = 0  # keys that a query of attention sees; 0: all

    def distance(self, op: str, chip: str, dtype: str, shape: tuple, window: int = 0) -> float:
        """Returns how far a shape is from this row's: the largest log2 ratio of their sizes.

        The distance is infinite if it exceeds NEAR, or if the row has another op, chip or type.
        Only sizes that determine the speed count.
        """
        if (self.op, self.chip, self.dtype) != (op, chip, dtype):
            return math.inf
        wanted = _what_determines_speed(op, chip, shape, window)
        pairs = zip(wanted, _what_determines_speed(op, chip, self.shape, self.window), strict=True)
        farthest = max(abs(math.log2(a / b)) for a, b in pairs)
        return farthest if farthest <= NEAR else math.inf


def _what_determines_speed(op, chip, shape, window) -> tuple:
    """Returns the numbers on which the ratio of two implementations' times depends.

    The number of attention's heads does not matter once their blocks fill the chip.
    """
    if op != "attention":
        return shape
    B, T, H, G, K = shape
    filled = B * H * T / QUERIES / CHIPS[chip].sms
    return T, H / G, K, min(filled, 1.0), min(window or T, T)


def minor_series(version: str) -> list[str]:
    """Returns the first two numbers of a version: later ones of JAX only fix its compilers."""
    return version.split(".")[:2]


class BodyChoice(NamedTuple):
    """The tiles to use, whose types select each kernel's body, and whether the kernel is faster."""

    tiles: OpTiles | None
    faster: bool
    reason: str


def _kernel_tiles_from_json(op: str, values: Any) -> Any:
    """Returns tiles of the type whose body is among the values; without one they are Triton's."""
    of_body = {kind._field_defaults.get("body"): kind for kind in kinds_of(op)}
    body = next((value for value in values if value in of_body), None)
    return of_body[body](*values)


def tiles_from_json(op: str, value: Any) -> OpTiles | None:
    """Returns the tiles of an op's kernels from their form in JSON, as the bench writes them."""
    if value is None:
        return None
    if op == "attention":
        return FlashAttentionTiles(*(_kernel_tiles_from_json(op, x) for x in value))
    return {name: _kernel_tiles_from_json(op, x) for name, x in value.items()}


def _check_row(row):
    """Raises ValueError, TypeError or AttributeError if a row cannot be of the bench."""
    minor_series(row.jax)
    if row.chip not in CHIPS or len(row.shape) != len(SHAPES.get(row.op, "")):
        raise ValueError(f"op={row.op}, chip={row.chip}, shape={row.shape}")
    if not isinstance(row.window, int) or row.window < 0:
        raise ValueError(f"window={row.window!r}")
    if not all(0 < number < math.inf for number in (*row.shape, row.kernel_s, row.other_s)):
        raise ValueError(f"shape={row.shape}, kernel_s={row.kernel_s}, other_s={row.other_s}")


@functools.cache
def read_rows(folder: Path = TUNED) -> list[BenchRow]:
    """Returns the rows of all chips.

    Raises:
        ValueError: a file does not have the format that bench writes.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            table = json.loads(path.read_text())
            if not isinstance(table, list):
                raise ValueError("no list")
            for values in table:
                row = BenchRow(**values)
                tiles = tiles_from_json(row.op, row.tiles)
                rows.append(row._replace(shape=tuple(row.shape), tiles=tiles))
                _check_row(rows[-1])
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} must contain rows of the bench; got {error!r}.") from error
    return rows


def _kernels(op: str, tiles: OpTiles | None) -> dict[str, Any]:
    """Returns {name: tiles} of an op's kernels; a kernel without tiles has the op's name."""
    return {op: None} if tiles is None else tiles if isinstance(tiles, dict) else tiles._asdict()


def _mosaic_obstacle(op, tiles, dtype, shape) -> str:
    """Returns why those bodies that are not Triton's cannot compute a shape; "" if they can."""
    bodies = {body_of(x) for x in _kernels(op, tiles).values() if not is_triton(x)}
    if not bodies:
        return ""
    if reason := explain_missing_mosaic():
        return reason
    if dtype not in MOSAIC_TYPES:
        return f"Mosaic's takes {' or '.join(MOSAIC_TYPES)}; got {dtype}"
    if op != "attention":
        if any(size % 64 for size in shape):
            return f"Mosaic's needs multiples of 64; got {', '.join(map(str, shape))}"
        return ""
    _, T, *_, K = shape
    if K not in MOSAIC_HEADS:
        return f"Mosaic's has heads of {' or '.join(map(str, MOSAIC_HEADS))}; got {K}"
    if "mosaic" in bodies and T > 8 and T % 8:  # the one for Ampere pads them
        return f"Mosaic's takes up to 8 tokens or a multiple of 8; got {T}"
    return ""


def _untimed_tiles(op, arch, dtype, shape) -> tuple[OpTiles | None, str]:
    """Returns the tiles of an op that no measurement decides, and the reason for its body.

    Where Mosaic comes first, it was faster than Triton's body in each contest that ran on a card.
    """
    if has_triton() and op not in MOSAIC_FIRST.get(arch, ()):
        return default_tiles(op, arch, shape), ""
    tiles = mosaic_tiles(op, arch)
    if obstacle := _mosaic_obstacle(op, tiles, dtype, shape):
        return default_tiles(op, arch, shape), f"; its body is Triton's: {obstacle}"
    why = f"the first choice on {arch}" if has_triton() else "as this JAX has no Triton backend"
    return tiles, f"; its body is Mosaic's, {why}"


def find_body_obstacle(op: str, tiles: OpTiles | None, matrices: Iterable[tuple[int, int]]) -> str:
    """Returns why bodies of an op cannot be compiled, or not for all matrices; "" if they can.

    Args:
        tiles: select the bodies.
        matrices: the sizes of those whose Gram matrices `square` computes, the smaller first.
    """
    kernels = _kernels(op, tiles)
    if not has_triton():  # JAX has removed it
        names = ", ".join(name for name, value in kernels.items() if is_triton(value))
        if names:
            return f"jax no longer has the Triton backend, which compiles the body of {names}"
    others = [x for x in kernels.values() if not is_triton(x)]
    if op != "square" or not others:
        return ""
    # The body for Ampere moves its last tile into the matrix, which must have a tile's rows.
    least = max(x.rows if body_of(x) == "ampere" else 64 for x in others)
    refused = [(M, N) for M, N in sorted(matrices) if M < least or M % 64 or N % 64]
    if not refused:
        return ""
    got = ", ".join(f"{M}x{N}" for M, N in refused)
    return (
        "Mosaic's body takes matrices with both sides a multiple of 64, the smaller at least "
        f"{least}; got {got}"
    )


def _nearest_row(rows, documents, *where) -> BenchRow | None:
    """Returns the row with the nearest shape, the newest if several are; None if no row is near.

    If documents were not measured, a row without them counts where the kernel was faster: it beat
    cuDNN's attention, which cannot mask documents, and XLA's, which a mask does not make faster.
    """

    def nearest(documents):
        near = [row for row in reversed(rows) if row.documents == documents]
        row = min(near, key=lambda row: row.distance(*where), default=None)
        return row if row and row.distance(*where) < math.inf else None

    row = nearest(documents)
    if row is None and documents:
        row = nearest(False)
        row = row if row and row.kernel_s < row.other_s else None
    return row


def _replace_spilling(op, arch, tiles, K) -> tuple[OpTiles | None, str]:
    """Returns tiles whose kernels have registers for a mask, and which of them were replaced."""
    why = ""
    for kernel, measured in _kernels(op, tiles).items():
        if not has_mask_registers(kernel, measured, K):
            usual = kernel_tiles(mosaic_tiles(op, arch), kernel)
            tiles = replace_tiles(tiles, kernel, usual)
            why += f"; its {kernel} has tiles of {describe_tiles(usual)}, because the measured "
            why += f"{describe_tiles(measured)} spill registers with documents or a window"
    return tiles, why


def choose_body(
    op: str,
    arch: str,
    chip: str,
    dtype: str,
    shape: tuple,
    folder: Path = TUNED,
    *,
    documents: bool = False,
    window: int = 0,
    other_window: bool = False,
) -> BodyChoice:
    """Returns the tiles of an op's kernels, and whether they were measured to be faster.

    Args:
        op: one of OPS.
        arch: a key of TILES.
        chip: a name of the chip table, or "" for a GPU that is not in it.
        dtype: a name, such as "bfloat16".
        shape: as in BenchRow, on one device.
        documents: whether attention is masked between documents.
        window: how many keys a query of attention sees; 0: all.
        other_window: other layers, which use the same tiles, have a window.
    """
    rows, where = read_rows(folder), (op, chip, dtype, shape, window)
    same_jax = [row for row in rows if minor_series(row.jax) == minor_series(jax.__version__)]
    row = _nearest_row(same_jax, documents, *where)
    if row is None and chip in TWINS:
        twin = op, TWINS[chip], *where[2:]
        row = _nearest_row(same_jax, documents, *twin)
    if row is None:
        reason = f"its kernel was not measured on {chip or arch} at this shape"
        reason += f" with a window of {window}" if window else ""
        if other := _nearest_row(rows, documents, *where):
            reason += f" with jax {jax.__version__}, but with {other.jax}"
        tiles, why = _untimed_tiles(op, arch, dtype, shape)
        return BodyChoice(tiles, False, reason + why)
    if obstacle := _mosaic_obstacle(op, row.tiles, dtype, shape):
        reason = f"its fastest body cannot run: {obstacle}"
        return BodyChoice(default_tiles(op, arch, shape), False, reason)
    ratio = row.kernel_s / row.other_s
    reason = f"{ratio:.2f} times the time of {row.other} on {row.chip}, {row.date}"
    if documents and not row.documents:
        reason += ", measured without documents"
    tiles, why = row.tiles, ""
    if documents or window or other_window:
        tiles, why = _replace_spilling(op, arch, tiles, shape[-1])
    return BodyChoice(tiles, ratio < 1, reason + why)

"""A model of each innermost loop: the cycles that its instructions keep each unit busy.

The unit of time is a turn of four warps, one on each quadrant of a multiprocessor, so that the
figures do not depend on how many warps run. Two bounds follow. The overlapped one is the time of
the busiest unit, with all others hidden behind it: no schedule is faster. The serial one is the sum
of all units, with nothing hidden: what a kernel reaches whose units only take turns. Both leave out
latencies, bank conflicts, and all that lies outside the loops.

machine_rates.py has the rates of the units and their sources.
"""

import math
from typing import Any, NamedTuple

from pallas_kernels.audit_cases import Case
from pallas_kernels.call_flops import ATTENTION_WORK, STORED_WORK
from pallas_kernels.chip import Chip
from pallas_kernels.machine_code import UNITS_OF_NAMES, Loop
from pallas_kernels.machine_rates import RATES, Rates
from pallas_kernels.offline import KernelReport

WARP_GROUP = 4  # warps
HALF_BYTES = 2  # of an element of the operands


class Cycles(NamedTuple):
    """Cycles of one multiprocessor for a turn of four warps, by unit."""

    tensor: float
    mufu: float
    fma: float
    alu: float
    shared: float  # shared memory and L1 cache: loads, stores, shuffles and copies
    operands: float  # shared memory, too: what Hopper's products read from it themselves
    issue: float  # one slot for each instruction of a warp

    @property
    def overlapped(self) -> float:
        """The busiest unit."""
        return max(*self[:4], self.shared + self.operands, self.issue)

    @property
    def serial(self) -> float:
        """The sum of all units; a product and its reading of operands are one operation."""
        return max(self.tensor, self.operands) + sum(self[1:5])


def loop_flops(loop: Loop) -> float:
    """Returns the FLOPs of a loop's tensor-core products in a turn of four warps."""
    sizes = {"HMMA": lambda size: 4 * 16 * 8 * size, "HGMMA": lambda size: 64 * 16 * size}
    return sum(
        2 * sizes[operation.name](operation.size) * count
        for operation, count in loop.operations.items()
        if operation.name in sizes
    )


def loop_cycles(loop: Loop, rates: Rates, copied_bytes: float = 0.0) -> Cycles:
    """Returns the cycles of a turn of four warps.

    Args:
        copied_bytes: of shared memory that a unit outside the loop fills for each turn.
    """
    busy = dict.fromkeys(("FMA", "ALU", "MUFU"), 0.0)
    shared_bytes, operand_bytes = copied_bytes, 0.0
    for operation, count in loop.operations.items():
        name, size, reads_shared = operation
        unit = UNITS_OF_NAMES.get(name)
        if unit in busy:
            busy[unit] += count * rates.cycles(unit, name)
        elif name == "SHFL":
            shared_bytes += count * rates.cycles("SHFL", name) * rates.shared_bytes
        elif name == "HGMMA":
            operand_bytes += count * HALF_BYTES * 16 * (size + 64 * reads_shared)
        elif unit == "memory":
            shared_bytes += count * WARP_GROUP * 32 * size
    return Cycles(
        loop_flops(loop) / 2 / rates.tensor_fmas,
        busy["MUFU"],
        busy["FMA"],
        busy["ALU"],
        shared_bytes / rates.shared_bytes,
        operand_bytes / rates.shared_bytes,
        sum(loop.units.values()),
    )


class Work(NamedTuple):
    """The tiles that a kernel's loops compute; a turn of all warps computes one tile."""

    flops: float  # of one tile's products
    copied_bytes: float  # of operands that a tile needs in shared memory
    whole: float  # tiles in the whole kernel
    cut: float  # tiles that the diagonal or the window's edge cuts, besides


def triangle_tiles(
    length: int, rows: int, columns: int, window: int | None = None
) -> tuple[int, int]:
    """Returns how many tiles of a lower triangle lie inside it, and how many its edges cut.

    Args:
        window: how many elements of a row belong to the triangle, up to the diagonal; None: all.
    """
    whole = cut = 0
    for first in range(0, length, rows):
        end = min(first + rows, length)
        hidden = [max(n - (window or length), 0) for n in (first + 1, end)]  # before the window
        inside = max((first + 1) // columns - -(-hidden[1] // columns), 0)
        whole += inside
        cut += -(-end // columns) - hidden[0] // columns - inside
    return whole, cut


def _rounds(tiles, chip):
    """Returns the tiles that the chip has time for until the busiest multiprocessor is done."""
    return -(-tiles // chip.sms) * chip.sms


def tile_work(case: Case, tiles: Any, chip: Chip) -> Work:
    """Returns the tiles of a case: of attention the visits, of a product those of the result."""
    if case.op == "attention":
        B, T, H, _, K = case.sizes
        q, s = tiles.queries, tiles.keys
        whole, cut = (B * H * n for n in triangle_tiles(T, q, s, case.window))
        if getattr(tiles, "variant", "") == "stored":
            return Work(STORED_WORK * 4 * q * s * K, HALF_BYTES * s * (q + K), whole, cut)
        streamed = q if case.kernel == "dkv" else s  # rows of two operands
        flops = ATTENTION_WORK[case.kernel] * 4 * q * s * K
        return Work(flops, HALF_BYTES * 2 * streamed * K, whole, cut)
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth
    if case.op == "head":
        N, D, V = case.sizes
        count, length = math.ceil(N / rows) * math.ceil(V / columns), D
    else:
        X, M, length = case.sizes
        side = max(rows, columns)  # the diagonal is covered by square blocks
        blocks = math.ceil(M / side)
        count = X * blocks * (blocks + 1) // 2 * side * side // (rows * columns)
    flops, copied_bytes = 2 * rows * columns * depth, HALF_BYTES * (rows + columns) * depth
    return Work(flops, copied_bytes, _rounds(count, chip) * math.ceil(length / depth), 0)


class LoopBound(NamedTuple):
    """A loop's cycles, and the FLOP/s at which a whole chip then runs its products."""

    loop: Loop
    cycles: Cycles
    overlapped_flops: float
    serial_flops: float


def bound_loop(loop: Loop, chip: Chip, copied_bytes: float = 0.0) -> LoopBound:
    """Returns the bounds of a loop with products; see loop_cycles."""
    cycles = loop_cycles(loop, RATES[chip.capability], copied_bytes)
    flops = loop_flops(loop) * chip.sms * chip.tensor_clock_ghz * 1e9
    return LoopBound(loop, cycles, flops / cycles.overlapped, flops / cycles.serial)


class Bounds(NamedTuple):
    """Bounds of a kernel's time, and the loops that they come from."""

    loops: list[LoopBound]
    overlapped_s: float
    serial_s: float


def find_bounds(case: Case, report: KernelReport, chip: Chip, tiles: Any) -> Bounds | None:
    """Returns bounds of a kernel's time by its inner loops; None if no loop has products.

    Where one loop is for tiles that need no mask and one for those that do, the cheapest loop
    computes the whole tiles, and the most expensive those that the diagonal cuts. Products that a
    turn computes twice count twice; a turn with a whole multiple of a tile's products counts as
    several tiles. No bound is below the time that the bytes of HBM take.
    """
    if not report.resources.loops:
        return None
    work, warps = tile_work(case, tiles, chip), report.threads // 32
    if report.resources.instructions["USETMAXREG"]:
        warps -= WARP_GROUP  # which only copies
    loops, overlapped, serial = [], [], []  # the two are the seconds of a tile in each loop
    for loop in report.resources.loops:
        done = loop_flops(loop) * warps / WARP_GROUP / work.flops  # tiles in a turn
        repeats = max(done / max(math.floor(done), 1), 1.0)
        copies = any(operation.name == "LDGSTS" for operation in loop.operations)
        share = loop_flops(loop) / (work.flops * repeats)  # of a tile, in a turn of four warps
        bound = bound_loop(loop, chip, 0.0 if copies else work.copied_bytes * share)
        loops.append(bound)
        overlapped.append(work.flops * repeats / bound.overlapped_flops)
        serial.append(work.flops * repeats / bound.serial_flops)
    hbm_s = case.hbm_bytes / chip.hbm_bytes_per_s
    time = lambda costs: max(work.whole * min(costs) + work.cut * max(costs), hbm_s)
    return Bounds(loops, time(overlapped), time(serial))

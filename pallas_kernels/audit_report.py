"""What the audit prints and writes of a compiled kernel."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.audit_cases import Case
from pallas_kernels.chip import Chip
from pallas_kernels.loop_model import WARP_GROUP, Bounds, LoopBound, find_bounds, loop_cycles
from pallas_kernels.machine_code import ARITHMETIC, UNITS_OF_NAMES
from pallas_kernels.machine_rates import RATES
from pallas_kernels.offline import KernelReport
from pallas_kernels.result_files import read_object, write_json
from pallas_kernels.tiles import (
    AmpereAttentionTiles,
    AttentionTiles,
    BlockTiles,
    MosaicAttentionTiles,
    body_of,
)

HEADER = (
    f"{'kernel':23} {'body':6} {'shape':25} {'registers':>9} {'spills':>6} {'shared':>7} "
    f"{'threads':>7} {'blocks/SM':>9} {'tensor':>6} {'async':>5} {'roofline':>11} "
    f"{'overlapped':>11} {'serial':>11}"
)


def scores_a_thread(
    report: KernelReport, tiles: AttentionTiles | AmpereAttentionTiles | MosaicAttentionTiles
) -> float:
    """Returns the scores of a block that each thread computes; a group of Mosaic's copies."""
    copying = 32 * WARP_GROUP if body_of(tiles) == "mosaic" else 0
    return tiles.queries * tiles.keys / (report.threads - copying)


def arithmetic_a_score(
    case: Case,
    report: KernelReport,
    tiles: AttentionTiles | AmpereAttentionTiles | MosaicAttentionTiles,
) -> list[float]:
    """Returns the arithmetic instructions a score of each innermost loop, as audit.py defines."""
    scores = scores_a_thread(report, tiles)
    rescaled = scores * case.K / tiles.keys if case.kernel == "forward" else 0
    return [(loop.arithmetic - rescaled) / scores for loop in report.resources.loops]


def arithmetic_an_element(report: KernelReport, tiles: BlockTiles) -> float:
    """Returns the arithmetic instructions of an entire kernel for each element of a block."""
    instructions = report.resources.operations
    count = sum(n for x, n in instructions.items() if UNITS_OF_NAMES.get(x.name) in ARITHMETIC)
    return count * report.threads / (tiles.rows * tiles.columns)


def shared_cycles_of_32_scores(
    report: KernelReport, tiles: AttentionTiles, chip: Chip
) -> list[float]:
    """Returns for how long each innermost loop keeps shared memory busy for 32 scores, in cycles.

    Counts no copies by a unit outside the loop.
    """
    scores = scores_a_thread(report, tiles) * 32 * WARP_GROUP  # of a turn of four warps
    cycles = (loop_cycles(loop, RATES[chip.capability]) for loop in report.resources.loops)
    return [32 * busy.shared / scores for busy in cycles]


def format_loop(bound: LoopBound) -> str:
    cycles = ", ".join(f"{cycles:.0f} {unit}" for unit, cycles in bound.cycles._asdict().items())
    return (
        f"  loop of {bound.loop} instructions\n    cycles: {cycles}; "
        f"{bound.overlapped_flops / 1e12:.1f} TFLOP/s overlapped, "
        f"{bound.serial_flops / 1e12:.1f} serial"
    )


@dataclass(frozen=True)
class Entry:
    """One compiled kernel."""

    chip: Chip
    case: Case
    body: str
    report: KernelReport
    tiles: Any  # of this kernel; None for a kernel without

    @functools.cached_property
    def bounds(self) -> Bounds | None:
        """Bounds of the kernel's time by its innermost loops; None if it has no products."""
        return find_bounds(self.case, self.report, self.chip, self.tiles)

    @property
    def roofline_s(self) -> float:
        """The least time that the chip's peaks allow."""
        return self.chip.seconds(self.case.hbm_bytes, self.case.flops)

    def format_row(self) -> str:
        """Returns the kernel's row of the table."""
        case, report, resources = self.case, self.report, self.report.resources
        times_s = [self.roofline_s, *(self.bounds[1:] if self.bounds else ())]
        return (
            f"{case.name:23} {self.body:6} {case.shape:25} {resources.registers:9} "
            f"{resources.spills:6} {report.shared_bytes:7} {report.threads:7} "
            f"{report.blocks_per_sm(self.chip):9} {resources.tensor_products:6} "
            f"{resources.async_copies:5} {' '.join(f'{1e6 * s:8.1f} us' for s in times_s)}"
        )

    def format(self) -> str:
        """Returns the kernel's row, and two lines for each of its innermost loops."""
        loops = [format_loop(loop) for loop in self.bounds.loops] if self.bounds else []
        if self.case.budget:
            figures = arithmetic_a_score(self.case, self.report, self.tiles)
            loops = [f"{loop}; {x:.2f} a score" for loop, x in zip(loops, figures, strict=True)]
        if self.case.element_budget:
            figure = arithmetic_an_element(self.report, self.tiles)
            loops = [f"  {figure:.2f} arithmetic instructions an element of a block"]
        return "\n".join([self.format_row(), *loops])

    def to_json(self) -> dict[str, Any]:
        """Returns all figures; times are in seconds, those of loops in cycles."""
        report, bounds = self.report, self.bounds
        row = {
            "chip": self.chip.name,
            "kernel": self.case.name,
            "body": self.body,
            "shape": self.case.shape,
            "tiles": self.tiles,
            "registers": report.resources.registers,
            "spills": report.resources.spills,
            "shared_bytes": report.shared_bytes,
            "threads": report.threads,
            "blocks_per_sm": report.blocks_per_sm(self.chip),
            "flops": self.case.flops,
            "hbm_bytes": self.case.hbm_bytes,
            "roofline_s": self.roofline_s,
        }
        if bounds:
            row |= {"overlapped_s": bounds.overlapped_s, "serial_s": bounds.serial_s}
            row["loops"] = [
                {"instructions": loop.loop.units, "cycles": loop.cycles._asdict()}
                for loop in bounds.loops
            ]
        return row


def write_entries(
    path: Path, entries: Iterable[Entry], faults: list[str], more: bool = False
) -> None:
    """Writes all figures as JSON.

    Args:
        more: add them to those of the chips that the file has.
    """
    stored = read_object(path) if more else {"kernels": [], "faults": []}
    rows = stored["kernels"] + [entry.to_json() for entry in entries]
    faults = stored["faults"] + faults
    write_json(path, {"jax": jax.__version__, "kernels": rows, "faults": faults})

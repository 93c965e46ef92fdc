"""Compiles every kernel for a GPU that is not present, and checks the resources that it uses.

    JAX_PLATFORMS=cpu python -m pallas_kernels.audit --chip=a40
    JAX_PLATFORMS=cpu python -m pallas_kernels.audit            # a40 and h100
    JAX_PLATFORMS=cpu python -m pallas_kernels.audit --sweep    # all tiles of the search space
    JAX_PLATFORMS=cpu python -m pallas_kernels.audit --json=audit.json

It needs no GPU, but the extra `offline` (pip install "jaxtrain[offline]"). It measures no times;
python -m pallas_kernels.bench does that, on the GPU.

The columns are registers per thread, instructions that spill registers to memory, bytes of shared
memory per block, threads per block, blocks that fit on a multiprocessor, tensor-core instructions,
asynchronous copies, and three times. The roofline is the least time that the chip's peaks allow.
The other two are of a model of the kernel's innermost loops, read from its machine code, without
what lies outside the loops: "overlapped" is the time of the busiest unit, behind which all others
hide, so that no schedule of the same instructions is faster; "serial" is the sum of all units,
which take turns. A kernel that loses time to latencies takes longer than both.

Below each kernel with products stand its innermost loops: first the instructions of a warp by unit
(tensor cores; FMA, ALU and MUFU, which computes exp2; loads, stores and shuffles; other), then the
cycles for which a turn of four warps keeps a multiprocessor's units busy, and the TFLOP/s of the
products at these cycles. "shared" is shared memory and the L1 cache: loads, stores, shuffles and
copies; "operands" is the same memory, read by Hopper's products; "issue" has a slot for each
instruction. Bank conflicts do not count. machine_rates.py has the rates with their sources.

The arithmetic a score of attention's kernels is the instructions of FMA, ALU and MUFU, divided by a
thread's scores of a block; of Hopper's warp groups, the one that only copies does not count. It
leaves out the multiplications that rescale the forward's sum, one for each element of the result,
since their number depends only on the tiles. The forward has a loop without masks and one with
masks.

The exit status is 1 if a kernel
  - spills, or needs more shared memory than a block has;
  - lacks the tensor-core instructions that its products need;
  - is a Mosaic body without Hopper's warp-group products and tensor memory accelerator, or, on
    Ampere, without asynchronous copies;
  - has fewer blocks that fit on a multiprocessor than its floor in audit_cases.py;
  - spends more arithmetic on a score, in its leanest loop, than its budget in audit_cases.py;
  - is GELU's and spends more arithmetic on an element of a block, in the entire kernel, than its
    budget there, or loads or stores less than 16 bytes a thread at a time;
  - is attention's backward for Triton on Ampere and keeps shared memory busy for longer, for each
    score, than its ceiling there.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import mosaic
from pallas_kernels.arguments import Parser
from pallas_kernels.audit_cases import AMPERE_FORWARD_BUDGET, CASES, SHARED_CEILINGS, Case
from pallas_kernels.audit_peers import survey_peers
from pallas_kernels.audit_report import (
    HEADER,
    Entry,
    arithmetic_a_score,
    arithmetic_an_element,
    shared_cycles_of_32_scores,
    write_entries,
)
from pallas_kernels.chip import CHIPS, Chip
from pallas_kernels.offline import KernelReport, check_chips, compile_for
from pallas_kernels.search_space import candidates, default_bodies
from pallas_kernels.tiles import (
    MOSAIC,
    TILES,
    AttentionTiles,
    BlockTiles,
    OpTiles,
    body_of,
    describe_tiles,
    kernel_tiles,
    replace_tiles,
)

AUDITED = tuple(name for name, chip in CHIPS.items() if chip.arch in TILES)


def find_faults(
    case: Case,
    report: KernelReport,
    chip: Chip,
    body: str = "triton",
    tiles: Any = None,
) -> list[str]:
    """Returns a sentence for each requirement that a compiled kernel does not meet.

    Args:
        tiles: those of a kernel of attention or GELU, to check its budgets.
    """
    floor = 1 if body == "mosaic" else case.floor  # one block of Hopper's fills a multiprocessor
    resources, faults = report.resources, []
    if resources.stack_bytes or resources.spills:
        faults.append(
            f"spills: {resources.stack_bytes} bytes of stack, {resources.spills} instructions"
        )
    if report.shared_bytes > chip.shared_bytes_per_block:
        faults.append(
            f"needs {report.shared_bytes} bytes of shared memory; a block has "
            f"{chip.shared_bytes_per_block}"
        )
    if case.tensor_core and not resources.tensor_products:
        faults.append("no tensor-core instruction")
    if body == "mosaic" and not (resources.instructions["HGMMA"] and resources.tma_copies):
        faults.append("no warp-group product, or no copy by the tensor memory accelerator")
    if body == "ampere" and not resources.instructions["LDGSTS"]:
        faults.append("no asynchronous copy")
    if report.blocks_per_sm(chip) < floor:
        faults.append(f"{report.blocks_per_sm(chip)} blocks per multiprocessor; needs {floor}")
    if isinstance(tiles, BlockTiles):
        faults += _find_block_faults(case, report, tiles)
    elif tiles and case.budget:
        of_body = {"ampere": AMPERE_FORWARD_BUDGET, "mosaic": case.mosaic_budget}
        budget = of_body.get(body, case.budget)
        leanest = min(arithmetic_a_score(case, report, tiles), default=math.inf)
        if leanest > budget:
            faults.append(
                f"{leanest:.2f} arithmetic instructions a score in its leanest loop; the budget is "
                f"{budget:g}"
            )
    if isinstance(tiles, AttentionTiles) and chip.arch == "sm_86":
        ceiling = SHARED_CEILINGS.get((case.kernel, case.K), math.inf)
        busy = min(shared_cycles_of_32_scores(report, tiles, chip), default=0.0)
        if busy > ceiling:
            faults.append(f"{busy:.1f} cycles of shared memory for 32 scores; at most {ceiling:g}")
    return faults


def _find_block_faults(case: Case, report: KernelReport, tiles: BlockTiles) -> list[str]:
    """Returns what is wrong with a kernel that memory limits: narrow accesses, or arithmetic."""
    faults = []
    widths = Counter()
    for operation, count in report.resources.operations.items():
        if operation.name in ("LDG", "STG"):
            widths[operation.size] += count
    if narrow := {size: count for size, count in sorted(widths.items()) if size < 16}:
        counts = ", ".join(f"{count} of {size} bytes" for size, count in narrow.items())
        faults.append(f"loads or stores less than 16 bytes a thread: {counts}")
    figure = arithmetic_an_element(report, tiles)
    if figure > case.element_budget:
        faults.append(
            f"{figure:.2f} arithmetic instructions an element of a block; the budget is "
            f"{case.element_budget:g}"
        )
    return faults


# Mosaic raises ValueError where a kernel needs more shared memory than a block has.
COMPILE_ERRORS = jax.errors.JaxRuntimeError, ValueError


def compile_kernels(
    build: Callable[[Any], tuple[Callable, tuple]], chip: Chip, tiles: OpTiles | None
) -> dict[str, KernelReport]:
    """Compiles a case's program; returns {kernel's name: report}. Raises as compile_for does."""
    function, abstract = build(tiles)
    return compile_for(chip, function, *abstract)[1]


def sweep(chip: Chip, show: Callable[[str], None] = print) -> None:
    """Compiles all tiles of the search space at one shape per kernel; shows those without faults.

    Raises:
        RuntimeError: the compiler for GPUs is not installed.
    """
    show(f"{chip.name}: all tiles that do not spill and fit in shared memory")
    show(HEADER)
    for case in {case.kernel: case for case in reversed(CASES) if case.kernel}.values():
        tried = [t for kernel, t in candidates(case.op, chip.arch) if kernel == case.kernel]
        good = 0
        for op_tiles in tried:
            try:
                report = compile_kernels(case.build, chip, op_tiles)[case.name]
            except COMPILE_ERRORS:
                continue
            tiles = kernel_tiles(op_tiles, case.kernel)
            if not find_faults(case._replace(floor=1), report, chip, body_of(tiles)):
                good += 1
                entry = Entry(chip, case, body_of(tiles), report, tiles)
                show(f"{entry.format_row()}  {describe_tiles(tiles)}")
        show(f"{case.name}: {good} of {len(tried)} tiles compile without faults")


def cases_with_bodies(chip: Chip, cases: list[Case] = CASES) -> list[tuple[Case, Any, str]]:
    """Returns (case, the op's tiles, body) for every body of every case on a chip."""
    entries = []
    for case in cases:
        tiles_of_body = {}
        for tiles in default_bodies(case.op, chip.arch, case.sizes):
            body = body_of(kernel_tiles(tiles, case.kernel)) if case.kernel else "triton"
            if case.only_body in ("", body):
                if case.tiles:
                    tiles = replace_tiles(tiles, case.kernel, case.tiles)
                tiles_of_body.setdefault(body, tiles)
        entries += [(case, tiles, body) for body, tiles in tiles_of_body.items()]
    return entries


def audit(
    chip: Chip, cases: list[Case] = CASES, show: Callable[[str], None] = print
) -> tuple[list[Entry], list[str]]:
    """Compiles every case for a chip and shows a table; returns its entries, and the faults.

    Raises:
        RuntimeError: the compiler for GPUs is not installed.
    """
    show(f"{chip.name}: {chip.kind}, {chip.arch}, compiled by jax {jax.__version__}; no GPU")
    show(HEADER)
    if chip.arch in MOSAIC and not mosaic.USABLE:
        show(f"{mosaic.REASON}; only Triton's bodies are audited")
    to_compile = cases_with_bodies(chip, cases)
    for case, _, body in to_compile:
        if case.only_body and mosaic.USABLE and case.op in MOSAIC.get(chip.arch, {}):
            show(f"{case.name} {case.shape}: only the {body} body, {case.why_only}")
    entries, faults, reports = [], [], {}
    for case, tiles, body in to_compile:
        where = f"{chip.name}: {case.name} ({body}) {case.shape}"
        # The other kernels of attention have no body for Ampere, and are compiled with Triton's.
        build = case.build_all if case.build_all and body != "ampere" else case.build
        try:
            if (build, body) not in reports:
                reports[build, body] = compile_kernels(build, chip, tiles)
        except COMPILE_ERRORS as error:
            faults.append(f"{where}: {str(error).splitlines()[0]}")
            continue
        report = reports[build, body][case.name]
        entry = Entry(chip, case, body, report, kernel_tiles(tiles, case.kernel) if tiles else None)
        show(entry.format())
        entries.append(entry)
        of_budget = entry.tiles if case.op in ("attention", "gelu") else None
        found = find_faults(case, report, chip, body, of_budget)
        faults += [f"{where}: {fault}" for fault in found]
    return entries, faults


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m pallas_kernels.audit", __doc__)
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="also compile every candidate tile size, to see which a chip can run; takes minutes",
    )
    parser.add_argument(
        "--json", type=Path, help="also write all figures, and the faults, to this JSON file"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also show the inner loops of tokamax's attention, where tokamax is installed",
    )

    def check(chip, args):
        entries, faults = audit(chip)
        if args.sweep:
            sweep(chip)
        if args.peers:
            survey_peers(chip)
        if args.json:
            write_entries(args.json, entries, faults, more=chip.name != args.chip[0])
        return faults

    check_chips(parser, argv, check, "audit passed", AUDITED)


if __name__ == "__main__":
    main()

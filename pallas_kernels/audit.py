"""Compiles every kernel for a GPU that is not present, and checks the resources that it uses.

    JAX_PLATFORMS=cpu python -m pallas_kernels.audit --chip=a40
    JAX_PLATFORMS=cpu python -m pallas_kernels.audit            # a40 and h100
    JAX_PLATFORMS=cpu python -m pallas_kernels.audit --sweep    # all tiles of the search space

It needs no GPU, but the extra `offline` (pip install "jaxtrain[offline]"). It measures no times;
python -m pallas_kernels.bench does that, on the GPU.

The columns are registers per thread, instructions that spill registers to memory, bytes of shared
memory per block, threads per block, blocks that fit on a multiprocessor, tensor-core instructions,
asynchronous copies, and the roofline: the least time that the chip's peaks allow.

Below attention's kernels, except Mosaic's for Hopper, stand the instructions of a warp in each
innermost loop by unit (tensor cores; FMA, ALU and MUFU, which computes exp2; loads, stores and
shuffles; other), and the arithmetic a score: those of FMA, ALU and MUFU, divided by a thread's
scores of a block. It leaves out the multiplications that rescale the forward's sum, one for each
element of the result, since their number depends only on the tiles. The forward has a loop without
masks and one with masks.

The exit status is 1 if a kernel
  - spills, or needs more shared memory than a block has;
  - lacks the tensor-core instructions that its products need;
  - is a Mosaic body without Hopper's warp-group products and tensor memory accelerator, or, on
    Ampere, without asynchronous copies;
  - has fewer blocks that fit on a multiprocessor than its floor in audit_cases.py;
  - spends more arithmetic on a score, in its leanest loop, than its budget in audit_cases.py.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import mosaic
from pallas_kernels.arguments import Parser
from pallas_kernels.audit_cases import CASES, Case
from pallas_kernels.chip import CHIPS, Chip
from pallas_kernels.offline import KernelReport, check_chips, compile_for
from pallas_kernels.search_space import candidates, default_bodies
from pallas_kernels.tiles import (
    MOSAIC,
    TILES,
    AmpereAttentionTiles,
    AttentionTiles,
    OpTiles,
    body_of,
    kernel_tiles,
)

AUDITED = tuple(name for name, chip in CHIPS.items() if chip.arch in TILES)


def arithmetic_a_score(
    case: Case, report: KernelReport, tiles: AttentionTiles | AmpereAttentionTiles
) -> list[float]:
    """Returns the arithmetic instructions a score of each innermost loop, as defined above."""
    scores = tiles.queries * tiles.keys / report.threads
    rescaled = tiles.queries * case.K / report.threads if case.kernel == "forward" else 0
    return [(loop.arithmetic - rescaled) / scores for loop in report.resources.loops]


def find_faults(
    case: Case,
    report: KernelReport,
    chip: Chip,
    body: str = "triton",
    tiles: AttentionTiles | AmpereAttentionTiles | None = None,
) -> list[str]:
    """Returns a sentence for each requirement that a compiled kernel does not meet.

    Args:
        tiles: those of an attention kernel's body for Triton or Ampere, to check its budget.
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
    if tiles and case.budget:
        leanest = min(arithmetic_a_score(case, report, tiles), default=math.inf)
        if leanest > case.budget:
            faults.append(
                f"{leanest:.2f} arithmetic instructions a score in its leanest loop; the budget is "
                f"{case.budget:g}"
            )
    return faults


HEADER = (
    f"{'kernel':23} {'body':6} {'shape':25} {'registers':>9} {'spills':>6} {'shared':>7} "
    f"{'threads':>7} {'blocks/SM':>9} {'tensor':>6} {'async':>5} {'roofline':>11}"
)


def format_row(case: Case, report: KernelReport, chip: Chip, body: str) -> str:
    """Returns the table's row of one compiled kernel."""
    resources = report.resources
    roofline_us = chip.seconds(case.hbm_bytes, case.flops) * 1e6
    return (
        f"{case.name:23} {body:6} {case.shape:25} {resources.registers:9} {resources.spills:6} "
        f"{report.shared_bytes:7} {report.threads:7} {report.blocks_per_sm(chip):9} "
        f"{resources.tensor_products:6} {resources.async_copies:5} {roofline_us:8.1f} us"
    )


def format_loops(
    case: Case, report: KernelReport, tiles: AttentionTiles | AmpereAttentionTiles
) -> list[str]:
    """Returns a line for each innermost loop of one of attention's kernels."""
    figures = arithmetic_a_score(case, report, tiles)
    return [
        f"  loop of {loop}: {figure:.2f} a score"
        for loop, figure in zip(report.resources.loops, figures, strict=True)
    ]


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
                sizes = "x".join(str(size) for size in tiles if size != body_of(tiles))
                show(f"{format_row(case, report, chip, body_of(tiles))}  {sizes}")
        show(f"{case.name}: {good} of {len(tried)} tiles compile without faults")


def cases_with_bodies(chip: Chip, cases: list[Case] = CASES) -> list[tuple[Case, Any, str]]:
    """Returns (case, the op's tiles, body) for every body of every case on a chip."""
    entries = []
    for case in cases:
        tiles_of_body = {}
        for tiles in default_bodies(case.op, chip.arch):
            body = body_of(kernel_tiles(tiles, case.kernel)) if case.kernel else "triton"
            if case.only_body in ("", body):
                tiles_of_body.setdefault(body, tiles)
        entries += [(case, tiles, body) for body, tiles in tiles_of_body.items()]
    return entries


def audit(chip: Chip, cases: list[Case] = CASES, show: Callable[[str], None] = print) -> list[str]:
    """Compiles every case for a chip, shows a table, and returns a sentence for each fault.

    Raises:
        RuntimeError: the compiler for GPUs is not installed.
    """
    show(f"{chip.name}: {chip.kind}, {chip.arch}, compiled by jax {jax.__version__}; no GPU")
    show(HEADER)
    if chip.arch in MOSAIC and not mosaic.USABLE:
        show(f"{mosaic.REASON}; only Triton's bodies are audited")
    entries = cases_with_bodies(chip, cases)
    for case, _, body in entries:
        if case.only_body and mosaic.USABLE and case.op in MOSAIC.get(chip.arch, {}):
            show(f"{case.name} {case.shape}: only the {body} body, {case.why_only}")
    faults, reports = [], {}
    for case, tiles, body in entries:
        where = f"{chip.name}: {case.name} ({body}) {case.shape}"
        # The other kernels of the op have no body for Ampere, and are compiled with Triton's.
        build = case.build_all if case.build_all and body != "ampere" else case.build
        try:
            if (build, body) not in reports:
                reports[build, body] = compile_kernels(build, chip, tiles)
        except COMPILE_ERRORS as error:
            faults.append(f"{where}: {str(error).splitlines()[0]}")
            continue
        report = reports[build, body][case.name]
        show(format_row(case, report, chip, body))
        attention_tiles = None
        if case.op == "attention" and body != "mosaic":
            attention_tiles = kernel_tiles(tiles, case.kernel)
            show("\n".join(format_loops(case, report, attention_tiles)))
        found = find_faults(case, report, chip, body, attention_tiles)
        faults += [f"{where}: {fault}" for fault in found]
    return faults


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m pallas_kernels.audit", __doc__)
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="also compile every candidate tile size, to see which a chip can run; takes minutes",
    )

    def check(chip, args):
        faults = audit(chip)
        if args.sweep:
            sweep(chip)
        return faults

    check_chips(parser, argv, check, "audit passed", AUDITED)


if __name__ == "__main__":
    main()

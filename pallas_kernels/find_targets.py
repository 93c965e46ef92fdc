"""Computes the target of each contest of bench from the model of our kernels' inner loops.

    JAX_PLATFORMS=cpu python -m pallas_kernels.find_targets        # writes targets.json
    JAX_PLATFORMS=cpu python -m pallas_kernels.find_targets --chip=h100 --beside=results.json

It compiles each body of the kernels for a chip that need not be present, and takes the body whose
serial time is the shortest: that time is the target. With --beside it shows, for the bodies and the
tiles in a result of bench, the measured time beside both times of the model, and writes nothing.
"""

from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.arguments import Parser
from pallas_kernels.audit import AUDITED, COMPILE_ERRORS, compile_kernels
from pallas_kernels.audit_cases import Case, contest_cases
from pallas_kernels.bench_results import OURS
from pallas_kernels.chip import Chip
from pallas_kernels.contests import build_contests
from pallas_kernels.kernel_choice import tiles_from_json
from pallas_kernels.loop_model import find_bounds
from pallas_kernels.offline import check_chips
from pallas_kernels.result_files import read_object, write_json
from pallas_kernels.search_space import default_bodies
from pallas_kernels.targets import TARGETS, Target, read_targets
from pallas_kernels.tiles import OpTiles, body_of, kernel_tiles


def contest_times(
    chip: Chip, cases: Sequence[Case], tiles: OpTiles, compiled: dict[Any, Any]
) -> tuple[float, float]:
    """Returns the overlapped and the serial time of a contest's kernels, one after another.

    Args:
        compiled: of other contests; one program has all kernels of attention at one shape.

    Raises:
        ValueError: a kernel has no loop, or needs more shared memory than a block has.
        jax.errors.JaxRuntimeError: a kernel does not compile.
    """
    overlapped_s = serial_s = 0.0
    for case in cases:
        build = case.build_all or case.build
        key = build, str(tiles)
        if key not in compiled:
            compiled[key] = compile_kernels(build, chip, tiles)
        report = compiled[key][case.name]
        bounds = find_bounds(case, report, chip, kernel_tiles(tiles, case.kernel))
        if not bounds:
            raise ValueError(f"{case.name} has no loop with products: the compiler unrolled it")
        overlapped_s, serial_s = overlapped_s + bounds.overlapped_s, serial_s + bounds.serial_s
    return overlapped_s, serial_s


def find_targets(
    chip: Chip, known: Collection[str] = (), show: Callable[[str], None] = print
) -> Iterator[tuple[str, Target]]:
    """Compiles the kernels of all contests but the known ones; yields (contest, its target).

    A contest of which no body has a time has no target. Shows the time of each body, or its error.
    """
    compiled = {}
    for contest in build_contests():
        cases = contest_cases(contest.name)
        if not cases or contest.name in known:
            continue
        bodies, where = [], f"{chip.name}: {contest.name}"
        for tiles in default_bodies(contest.op, chip.arch, contest.shape):
            body = body_of(kernel_tiles(tiles, cases[0].kernel))
            try:
                serial_s = contest_times(chip, cases, tiles, compiled)[1]
            except COMPILE_ERRORS as error:
                show(f"{where}: {body} has no time: {str(error).splitlines()[0]}")
                continue
            bodies.append(Target(body, serial_s))
            show(f"{where}: {body} {bodies[-1].describe(contest.flops)}")
        if bodies:
            yield contest.name, min(bodies, key=lambda target: target.serial_s)


def show_beside(chip: Chip, path: Path, show: Callable[[str], None] = print) -> None:
    """Shows a table in Markdown of measured times beside those of the model.

    Raises:
        ValueError: the file has no results of bench on this chip.
        OSError: it cannot be read.
    """
    results = read_object(path)
    if results.get("chip") != chip.name:
        raise ValueError(f"--beside must have results of {chip.name}; got {path}. Set --chip.")
    show("| contest | body | overlapped | measured | serial | measured / serial |")
    show("|---|---|---|---|---|---|")
    compiled = {}
    for name, result in results["contests"].items():
        cases = contest_cases(name) or []
        for body, timing in result["contestants"].items():
            if not cases or body not in OURS or isinstance(timing, str) or timing.get("fault"):
                continue
            tiles: Any = tiles_from_json(cases[0].op, timing["tiles"])
            overlapped_s, serial_s = contest_times(chip, cases, tiles, compiled)
            us = (f"{1e6 * s:.0f} us" for s in (overlapped_s, timing["median_s"], serial_s))
            ratio = timing["median_s"] / serial_s
            show(f"| {name} | {body} | {' | '.join(us)} | {ratio:.2f} |")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m pallas_kernels.find_targets", __doc__)
    parser.add_argument(
        "--beside", type=Path, help="show the times in this result of bench; write nothing"
    )

    parser.add_argument(
        "--missing", action="store_true", help="leave out the contests that have a target"
    )

    def run(chip: Chip, args: Namespace) -> list[str]:
        if args.beside:
            show_beside(chip, args.beside)
            return []
        known = read_targets().get(chip.name, {}) if args.missing else {}
        for name, target in find_targets(chip, known):
            stored: dict[str, Any] = read_object(TARGETS) if TARGETS.exists() else {"chips": {}}
            stored["chips"].setdefault(chip.name, {})[name] = target._asdict()
            write_json(TARGETS, {"jax": jax.__version__, "chips": stored["chips"]})
        return []

    check_chips(parser, argv, run, "done", AUDITED)


if __name__ == "__main__":
    main()

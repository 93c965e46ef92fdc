"""Times every kernel against all other implementations of the same op, on this machine's GPU.

    python -m pallas_kernels.bench --minutes=10 --out=kernels.json
    python -m pallas_kernels.bench --minutes=10 --tune --save    # writes tuned/CHIP.json
    JAX_PLATFORMS=cpu python -m pallas_kernels.bench --tiny      # a trial on any machine

--save writes pallas_kernels/tuned/CHIP.json, which training reads: where a kernel was faster, runs
with similar shapes use it. --tune first searches for each kernel's best tile sizes. --tiny
interprets the kernels at tiny shapes, to check that everything runs; its times mean nothing.

Each time is the median of 20 samples, with the 10th and 90th percentile, on random data. The other
implementations are XLA's, cuDNN's and tokamax' (where installed), and PyTorch's (where installed
with CUDA) on the same arrays, timed by CUDA events. To leave memory for PyTorch, JAX does not
preallocate it (XLA_PYTHON_CLIENT_PREALLOCATE=false, unless set). Speeds are also given as shares of
the ceiling: what a plain copy and a plain matrix product reach on the same GPU in the same run.

Results are written after every contest. When the time is up, bench lists the contests that it did
not measure.
"""

import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Parser
from pallas_kernels.chip import Chip, detect_chip
from pallas_kernels.contests import KERNEL, TINY, Contest, Sizes, build_contests
from pallas_kernels.kernel_choice import TUNED, BenchRow
from pallas_kernels.search_space import candidates, default_bodies
from pallas_kernels.tiles import OpTiles, default_tiles, kernel_tiles, replace_tiles
from pallas_kernels.timing import Timing, first_line, time_calls, time_or_error
from pallas_kernels.torch_contests import measure_torch


def measure_ceilings(size: int = 8_192) -> dict[str, float]:
    """Returns the FLOP/s of a bfloat16 product and the bytes/s of a copy on this device."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.bfloat16))
    copy = jax.jit(lambda a: a + 1)
    return {
        "matmul_flops_per_s": 2 * size**3 / time_calls(lambda: product(a)).median_s,
        "copy_bytes_per_s": 2 * a.nbytes / time_calls(lambda: copy(a)).median_s,
    }


def measure(contest: Contest, tiles: OpTiles | None, torch_device: str) -> dict[str, Timing | str]:
    """Times all contestants on the same arrays. Returns {name: Timing, or why it failed}.

    Args:
        torch_device: where PyTorch runs, "cuda" or "cpu".
    """
    arrays, results = contest.arrays(jax.random.key(1)), {}
    for name, function in contest.contestants(tiles).items():
        compiled = jax.jit(function)
        results[name] = time_or_error(lambda compiled=compiled: compiled(*arrays))
    return results | measure_torch(contest, arrays, torch_device)


def _kernel_seconds(contest, tiles, arrays) -> float:
    kernel = jax.jit(contest.contestants(tiles)[KERNEL])
    return time_calls(lambda: kernel(*arrays), samples=5).median_s


def best_body(contest: Contest, arch: str, show: Callable[[str], None]) -> tuple[float, Any]:
    """Returns (seconds, tiles) of the fastest of the op's bodies, each at its default tiles."""
    arrays = contest.arrays(jax.random.key(1))
    best_s, best = float("inf"), default_tiles(contest.op, arch)
    for body, tiles in zip(("Triton", "Mosaic"), default_bodies(contest.op, arch), strict=False):
        try:
            seconds = _kernel_seconds(contest, tiles, arrays)
        except Exception as error:
            show(f"{contest.name}: the {body} body failed: {first_line(error)}")
            continue
        show(f"{contest.name}: the {body} body took {seconds * 1e6:.1f} us")
        if seconds < best_s:
            best_s, best = seconds, tiles
    return best_s, best


def tune(contest: Contest, arch: str, until: float, show: Callable[[str], None]) -> OpTiles | None:
    """Returns the fastest tiles of the search space, found one kernel at a time.

    Args:
        until: the value of time.monotonic() at which the search stops.
    """
    arrays, (best_s, best) = contest.arrays(jax.random.key(1)), best_body(contest, arch, show)
    for kernel, tiles in candidates(contest.op, arch):
        if time.monotonic() > until:
            show(f"  time is up: the search for {contest.name} is incomplete")
            break
        tried = replace_tiles(best, kernel, kernel_tiles(tiles, kernel))
        try:
            seconds = _kernel_seconds(contest, tried, arrays)
        except Exception:  # needs too much shared memory: not a candidate here
            continue
        if seconds < best_s:
            best_s, best = seconds, tried
    return best


def as_row(
    contest: Contest, chip: str, tiles: OpTiles | None, results: dict[str, Timing | str]
) -> BenchRow | None:
    """Returns the row for kernel_choice.py, or None if the kernel or all others failed.

    PyTorch's times do not count, because training, which runs in JAX, cannot use PyTorch.
    """
    timed = {
        name: timing
        for name, timing in results.items()
        if isinstance(timing, Timing) and not name.startswith("torch")
    }
    if KERNEL not in timed or len(timed) < 2:
        return None
    other = min((name for name in timed if name != KERNEL), key=lambda name: timed[name].median_s)
    return BenchRow(
        contest.op,
        chip,
        "bfloat16",
        contest.shape,
        jax.__version__,
        tiles,
        timed[KERNEL].median_s,
        other,
        timed[other].median_s,
        f"{datetime.now(UTC):%Y-%m-%d}",
        " ".join(["python", "-m", "pallas_kernels.bench", *sys.argv[1:]]),
    )


def write_json(path: Path, value: Any) -> None:
    """Replaces a file atomically: a crash leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def format_results(
    contest: Contest, results: dict[str, Timing | str], ceiling: dict[str, float]
) -> Iterator[str]:
    """Yields a line per contestant: time, speed, share of the ceiling, time over the kernel's."""
    yield contest.name
    kernel = results[KERNEL]
    for name, timing in results.items():
        if isinstance(timing, str):
            yield f"  {name:14} failed: {timing}"
            continue
        flops, moved = (x / timing.median_s for x in (contest.flops, contest.hbm_bytes))
        share = max(flops / ceiling["matmul_flops_per_s"], moved / ceiling["copy_bytes_per_s"])
        ratio = "" if isinstance(kernel, str) else f" {timing.median_s / kernel.median_s:5.2f}x"
        yield (
            f"  {name:14} {timing!s:28} {flops / 1e12:7.1f} TFLOP/s {moved / 1e9:7.0f} GB/s "
            f"{share:4.0%} of the ceiling{ratio}"
        )


def _choose_tiles(contest, arch, args, until, show):
    if args.tune:
        return tune(contest, arch, until, show)
    if len(default_bodies(contest.op, arch)) > 1:
        return best_body(contest, arch, show)[1]
    return default_tiles(contest.op, arch)


def bench(args: Namespace, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs all contests, or as many as the time allows, and returns the results that it writes."""
    until = time.monotonic() + 60 * args.minutes
    chip: Chip | None = None if args.tiny else detect_chip()
    arch, chip_name = (chip.arch, chip.name) if chip else ("sm_86", "")
    device = jax.devices()[0].device_kind
    ceiling = measure_ceilings(256 if args.tiny else 8_192)
    show(f"{device}, jax {jax.__version__}: {ceiling}")
    results: dict[str, Any] = {"jax": jax.__version__, "device": device, **ceiling}
    results |= {"command": sys.argv, "date": f"{datetime.now(UTC):%Y-%m-%d}", "contests": {}}
    rows = {}
    for contest in build_contests(TINY if args.tiny else Sizes(), args.tiny):
        if time.monotonic() > until:
            show(f"{contest.name}: not measured, the {args.minutes:g} minutes are up")
            continue
        tiles = _choose_tiles(contest, arch, args, until, show)
        timings = measure(contest, tiles, "cpu" if args.tiny else "cuda")
        show("\n".join(format_results(contest, timings, ceiling)))
        results["contests"][contest.name] = {
            name: t if isinstance(t, str) else t._asdict() for name, t in timings.items()
        }
        row = as_row(contest, chip_name, tiles, timings)
        if row and "forward" not in contest.name:  # training needs both directions
            rows[(row.op, row.shape)] = row._asdict()
        if args.out:
            write_json(args.out, results)
        if args.save:
            write_json(TUNED / f"{chip_name}.json", list(rows.values()))
    return results


def parse(argv: list[str] | None = None) -> Namespace:
    """Parses the command line."""
    parser = Parser("python -m pallas_kernels.bench", __doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="no contest starts after this many minutes; default: 10",
    )
    parser.add_argument(
        "--tune", action="store_true", help="first search for each kernel's fastest tile sizes"
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help="write pallas_kernels/tuned/CHIP.json, from which training chooses its kernels",
    )
    parser.add_argument(
        "--out", type=Path, help="write all results to this JSON file after every contest"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="interpret the kernels at tiny shapes, on any device, as a trial",
    )
    args = parser.parse_args(argv)
    if args.tiny and (args.save or args.tune):
        parser.error("--tiny measures nothing useful: leave out --save and --tune.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    try:
        bench(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

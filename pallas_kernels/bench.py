"""Every kernel against all who can do the same, on the card at hand; the faster one is then routed.

    python -m pallas_kernels.bench --minutes=10 --out=kernels.json
    python -m pallas_kernels.bench --minutes=10 --tune --save    # writes tuned/CHIP.json
    JAX_PLATFORMS=cpu python -m pallas_kernels.bench --tiny      # interpreted: no figure counts

Medians of 20 samples with the range of the middle eight tenths, random data, all contestants in
one run. PyTorch, where it is installed with CUDA, takes part on the same arrays, timed by CUDA
events; JAX then takes memory as it needs it (XLA_PYTHON_CLIENT_PREALLOCATE=false, unless set).
Speeds are also given as shares of what the same card's own copy and matrix product reach in this
run. Every finished row is written at once; when the minutes are over, the rest is named.
"""

import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Parser
from pallas_kernels.chip import detect_chip
from pallas_kernels.contests import KERNEL, TINY, Sizes, build_contests
from pallas_kernels.kernel_choice import ROWS, BenchRow
from pallas_kernels.search_space import candidates, default_bodies
from pallas_kernels.tiles import default_tiles, kernel_tiles, replace_tiles
from pallas_kernels.timing import time_calls
from pallas_kernels.torch_contests import measure_torch


def measure_ceilings(size=8_192) -> dict[str, float]:
    """FLOP/s of a bfloat16 product and bytes/s of a copy on this device."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.bfloat16))
    copy = jax.jit(lambda a: a + 1)
    return {
        "matmul_flops_per_s": 2 * size**3 / time_calls(lambda: product(a)).median_s,
        "copy_bytes_per_s": 2 * a.nbytes / time_calls(lambda: copy(a)).median_s,
    }


def measure(contest, tiles, device) -> dict:
    """{contestant: Timing or the error that it ended in}, all on the same arrays.

    Args:
        device: torch's, "cuda" or "cpu".
    """
    arrays, found = contest.arrays(jax.random.key(1)), {}
    for name, function in contest.contestants(tiles).items():
        run = jax.jit(function)
        try:
            found[name] = time_calls(lambda run=run: run(*arrays))
        except Exception as error:  # one that cannot run must not end the others
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return found | measure_torch(contest, arrays, device)


def _seconds(contest, tiles, arrays) -> float:
    run = jax.jit(contest.contestants(tiles)[KERNEL])
    return time_calls(lambda: run(*arrays), samples=5).median_s


def best_body(contest, arch, show) -> tuple:
    """(seconds, tiles) of the fastest of the op's bodies, each with its default tiles."""
    arrays, best = (
        contest.arrays(jax.random.key(1)),
        (float("inf"), default_tiles(contest.op, arch)),
    )
    for body, tiles in zip(("Triton", "Mosaic"), default_bodies(contest.op, arch), strict=False):
        try:
            seconds = _seconds(contest, tiles, arrays)
        except Exception as error:
            show(f"{contest.name}: {body}'s body did not run: {str(error).splitlines()[0][:100]}")
            continue
        show(f"{contest.name}: {body}'s body took {seconds * 1e6:.1f} us")
        best = min(best, (seconds, tiles), key=lambda pair: pair[0])
    return best


def tune(contest, arch, until, show) -> tuple:
    """The fastest tiles of the search space, kernel after kernel, as far as the time allows."""
    arrays, (best_s, best) = contest.arrays(jax.random.key(1)), best_body(contest, arch, show)
    for part, tiles in candidates(contest.op, arch):
        if time.monotonic() > until:
            show(f"  the time is over: {contest.name} was not tuned to the end")
            break
        tried = replace_tiles(best, part, kernel_tiles(tiles, part))
        try:
            seconds = _seconds(contest, tried, arrays)
        except Exception:  # too much shared memory: not a candidate here
            continue
        if seconds < best_s:
            best_s, best = seconds, tried
    return best


def as_row(contest, chip, tiles, found) -> BenchRow | None:
    """What the routes read, of what JAX can run; None where the kernel or all others failed."""
    timed = {name: t for name, t in found.items() if not isinstance(t, str)}
    timed = {name: t for name, t in timed.items() if not name.startswith("torch")}
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


def write_json(path, value) -> None:
    """The whole file or the one before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def lines(contest, found, ceiling):
    """A contest's rows: time, TFLOP/s or GB/s, share of the ceiling, ratio to the kernel."""
    yield contest.name
    ours = found[KERNEL]
    for name, timing in found.items():
        if isinstance(timing, str):
            yield f"  {name:14} did not run: {timing}"
            continue
        flops, moved = (x / timing.median_s for x in (contest.flops, contest.hbm_bytes))
        share = max(flops / ceiling["matmul_flops_per_s"], moved / ceiling["copy_bytes_per_s"])
        ratio = "" if isinstance(ours, str) else f" {timing.median_s / ours.median_s:5.2f}x"
        yield (
            f"  {name:14} {timing!s:28} {flops / 1e12:7.1f} TFLOP/s {moved / 1e9:7.0f} GB/s "
            f"{share:4.0%} of the ceiling{ratio}"
        )


def bench(args, show=print) -> dict:
    """All contests until the minutes are over; the results, as they are written."""
    until = time.monotonic() + 60 * args.minutes
    chip = None if args.tiny else detect_chip()
    arch = "sm_86" if args.tiny else chip.arch
    ceiling = measure_ceilings(256 if args.tiny else 8_192)
    show(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {ceiling}")
    results = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, **ceiling}
    results |= {"command": sys.argv, "date": f"{datetime.now(UTC):%Y-%m-%d}", "contests": {}}
    latest = {}
    for contest in build_contests(TINY if args.tiny else Sizes(), args.tiny):
        if time.monotonic() > until:
            show(f"{contest.name}: not measured, the {args.minutes:g} minutes are over")
            continue
        if args.tune:
            tiles = tune(contest, arch, until, show)
        elif len(default_bodies(contest.op, arch)) > 1:
            tiles = best_body(contest, arch, show)[1]
        else:
            tiles = default_tiles(contest.op, arch)
        found = measure(contest, tiles, "cpu" if args.tiny else "cuda")
        show("\n".join(lines(contest, found, ceiling)))
        results["contests"][contest.name] = {
            name: t if isinstance(t, str) else t._asdict() for name, t in found.items()
        }
        row = as_row(contest, "" if args.tiny else chip.name, tiles, found)
        if row and "forward" not in contest.name:  # training goes both ways
            latest[(row.op, row.shape)] = row._asdict()
        if args.out:
            write_json(args.out, results)
        if args.save:
            write_json(ROWS / f"{chip.name}.json", list(latest.values()))
    return results


def parse(argv=None):
    parser = Parser("python -m pallas_kernels.bench", __doc__)
    parser.add_argument("--minutes", type=float, default=10, help="no contest starts after them")
    parser.add_argument("--tune", action="store_true", help="first search each op's tiles")
    parser.add_argument("--save", action="store_true", help="write the rows that routes read")
    parser.add_argument("--out", type=Path, help="a results file, rewritten after every contest")
    parser.add_argument("--tiny", action="store_true", help="interpreted, on any device: a trial")
    args = parser.parse_args(argv)
    if args.tiny and (args.save or args.tune):
        parser.error("--tiny measures nothing that could be routed: leave out --save and --tune.")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some too
    try:
        bench(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

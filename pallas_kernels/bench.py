"""Times every kernel against all other implementations of the same op, on this machine's GPU.

    python -m pallas_kernels.bench --minutes=10 --out=kernels.json
    python -m pallas_kernels.bench --minutes=10 --tune --save    # writes tuned/CHIP.json
    python -m pallas_kernels.bench --out=kernels.json --resume   # measures what is missing
    JAX_PLATFORMS=cpu python -m pallas_kernels.bench --tiny      # a trial on any machine

--save writes pallas_kernels/tuned/CHIP.json, which training reads: where a kernel was faster, runs
with similar shapes use it. --tune also tries a short list of tile sizes for each kernel. --tiny
interprets the kernels at tiny shapes, to check that everything runs; its times mean nothing.

Before a kernel is timed, its results on random data are compared with float64, at the tolerances of
the tests, and a second call must give the same bits. A kernel that fails this is reported, and not
timed or saved. The other implementations are XLA's, cuDNN's and tokamax' (where installed), and
PyTorch's (where installed with CUDA). Each time is the median of 20 samples, with the 10th and 90th
percentile. Speeds are also given as shares of the ceiling: what a plain copy and a plain matrix
product reach on the same GPU in the same run.

Each contest runs in a child process, so a kernel that hangs or crashes costs only its own row.
Results are written after every contest. When the time is up, bench lists the contests that it did
not measure; --resume with the same --out measures them.
"""

import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pallas_kernels.arguments import Parser
from pallas_kernels.bench_results import as_row, format_results
from pallas_kernels.child_process import ChildProcess
from pallas_kernels.contest import Contest
from pallas_kernels.contest_child import ContestJob, contests_of, write_json
from pallas_kernels.kernel_choice import TUNED
from pallas_kernels.search_space import SHORTLIST

COMMAND = sys.executable, "-m", "pallas_kernels.contest_child"
TUNED_OPS = tuple(SHORTLIST["sm_86"])
CONTEST_S = 150.0  # a contest without tuning is killed after this time
TUNE_S = 60.0  # for one contest
# A child's settings. PyTorch needs memory too, so JAX must not take all of it. XLA's own CUDA
# graphs are off: kernels inside them could run at the same time, and the times would mean nothing.
CHILD_ENV = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
CHILD_FLAGS = "--xla_gpu_enable_command_buffer="


class Child:
    """A contest's child process: started early, it imports and then waits for `run`."""

    def __init__(self, job: ContestJob, folder: Path):
        self.job, self._folder = job, Path(tempfile.mkdtemp(dir=folder))
        (self._folder / "job.json").write_text(json.dumps(vars(job)))
        flags = f"{os.environ.get('XLA_FLAGS', '')} {'' if job.tiny else CHILD_FLAGS}"
        env = CHILD_ENV | os.environ | {"XLA_FLAGS": flags.strip()}
        argv = [*COMMAND, *(str(self._folder / name) for name in ("job.json", "result.json"))]
        with open(self._folder / "output.txt", "wb") as output:
            self.process = ChildProcess(argv, output, env)

    def run(self, limit_s: float) -> dict[str, Any]:
        """Lets the child do its job. Returns its result, with "error" if it did not finish."""
        self.process.send_line()
        status = self.process.wait(limit_s)
        path = self._folder / "result.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        if status == 0:
            return result
        lines = (self._folder / "output.txt").read_text(errors="replace").strip().splitlines()
        reason = f"exit status {status}: {' | '.join(lines[-3:])[-400:]}"
        if status is None:
            reason = f"killed after {limit_s:.0f} s"
        return result | {"error": reason}


def _is_done(contest: Contest, result: dict[str, Any], tune: bool) -> bool:
    """Returns whether a contest has its results; the forward's tiles come with both ways."""
    if tune and (contest.op not in TUNED_OPS or "forward" in contest.name):
        return True
    return bool(result.get("done")) and (not tune or "tried" in result)


class Bench:
    """One run of the bench; the GPU is used only by its children."""

    def __init__(self, args: Namespace, folder: Path, show: Callable[[str], None]):
        self._args, self._folder, self._show = args, folder, show
        self._until = time.monotonic() + 60 * args.minutes
        self.results: dict[str, Any] = {"contests": {}}
        if args.resume and args.out.exists():
            self.results = json.loads(args.out.read_text())

    def _left_s(self) -> float:
        return self._until - time.monotonic()

    def measure_device(self) -> None:
        """Measures the device and its ceilings.

        Raises:
            ValueError: the device cannot be used, or --out holds results of another one.
        """
        device = Child(ContestJob(tiny=self._args.tiny), self._folder).run(CONTEST_S)
        if "error" in device:
            raise ValueError(device["error"])
        before = self.results.get("device")
        if before not in (None, device["device"]):
            raise ValueError(
                f"--resume must continue on the same device; {self._args.out} is of {before}, this "
                f"is {device['device']}. Set another --out."
            )
        facts = {k: v for k, v in device.items() if k != "contests"}
        self.results |= facts | {"command": sys.argv, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        if self._args.tiny:
            self.results["trial"] = "interpreted at tiny shapes; the times mean nothing"
        self._show(f"{device['device']}, jax {device['jax']}: {facts}")

    def run(self, contests: list[Contest]) -> None:
        """Runs the contests that are not done: first at the default tiles, then tuned."""
        args, stored = self._args, self.results["contests"]
        jobs = []
        for tune in (False, True) if args.tune else (False,):
            jobs += [(c, tune) for c in contests if not _is_done(c, stored.get(c.name, {}), tune)]
        waiting = self._start(jobs[0]) if jobs else None
        for i, (contest, tune) in enumerate(jobs):
            child, waiting = waiting, self._start(jobs[i + 1]) if i + 1 < len(jobs) else None
            if child is None or self._left_s() < 0:
                what = "tuned" if tune else "measured"
                self._show(f"{contest.name}: not {what}, the {args.minutes:g} minutes are up")
                if child:
                    child.process.kill()
                continue
            limit_s = CONTEST_S + (TUNE_S if tune else 0.0)
            result = child.run(max(min(limit_s, self._left_s()), 1.0))
            if "error" in result and stored.get(contest.name, {}).get("done"):
                result = stored[contest.name] | {"tuning_error": result["error"]}
            elif tune:
                before = stored.get(contest.name, {}).get("contestants", {})
                torch = {name: before[name] for name in before if name.startswith("torch")}
                result["contestants"] = torch | result.get("contestants", {})
            stored[contest.name] = result
            self._show("\n".join(format_results(contest, result, self.results, args.tiny)))
            self._write(contests)

    def _start(self, job: tuple[Contest, bool]) -> Child | None:
        contest, tune = job
        if self._left_s() < 0:
            return None
        tune_s = TUNE_S if tune else 0.0
        return Child(ContestJob(contest.name, tune_s, self._args.tiny), self._folder)

    def _write(self, contests: list[Contest]) -> None:
        if self._args.out:
            write_json(self._args.out, self.results)
        if not self._args.save:
            return
        rows = []
        for contest in contests:
            contestants = self.results["contests"].get(contest.name, {}).get("contestants", {})
            row = as_row(contest, self.results["chip"], contestants, self.results["jax"])
            if row and "forward" not in contest.name:  # training needs both directions
                rows.append(row._asdict())
        write_json(TUNED / f"{self.results['chip']}.json", rows)


def bench(args: Namespace, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs all contests, or as many as the time allows, and returns the results that it writes.

    Raises:
        ValueError: see Bench.measure_device.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Bench(args, Path(folder), show)
        run.measure_device()
        contests = contests_of(args.tiny)
        if args.only:
            contests = [c for c in contests if any(text in c.name for text in args.only)]
        run.run(contests)
    return run.results


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
        "--tune", action="store_true", help="also try a short list of each kernel's tile sizes"
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
        "--resume", action="store_true", help="keep the contests that --out already has"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        help="run the contests whose name contains one of these texts, such as attention",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="interpret the kernels at tiny shapes, on any device, as a trial",
    )
    args = parser.parse_args(argv)
    if args.tiny and args.save:
        parser.error("--tiny measures nothing useful: leave out --save.")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the file to continue.")
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        bench(parse(argv))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

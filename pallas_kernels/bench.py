"""Times every kernel against all other implementations of the same op, on this machine's GPU.

    python -m pallas_kernels.bench --minutes=10 --out=kernels.json
    python -m pallas_kernels.bench --out=kernels.json --resume   # measures what is missing
    python -m pallas_kernels.bench --minutes=15 --tune --save    # writes tuned/CHIP.json
    JAX_PLATFORMS=cpu python -m pallas_kernels.bench --tiny      # a trial on any machine

--save writes pallas_kernels/tuned/CHIP.json, which training reads: where a kernel was faster, runs
with similar shapes use it. A contest times each body of our kernel at its default tile sizes, and
at those that the table has (stored). --tune also tries a short list for each kernel, and times the
best together (tuned). --tiny interprets the kernels at tiny shapes, to check that everything runs;
its times mean nothing.

Before a kernel is timed, its results on random data are compared with float64, at the tolerances of
the tests, and a second call must give the same bits. A kernel that fails this is reported, and not
timed or saved. The other implementations are XLA's, cuDNN's and tokamax' (where installed), and
PyTorch's (where installed with CUDA). Each time is the median of 20 samples, with the 10th and 90th
percentile. Speeds are also given as shares of the ceiling: what a plain copy and a plain matrix
product reach on the same GPU in the same run.

A plan of the minutes comes first: how many contests there are, their limits, and which surely fit.
Contests whose shape this chip's table lacks run first, and the ops take turns. With --tune, one
contest of each kind is measured and tuned before the others, which are tuned at the end.
Each contest runs in a child process, so a kernel that hangs or crashes costs only its own row.
Results are written after every contest. One starts only if as much time is left as the longest so
far took (30 s before the first). When the time is up, bench lists the contests that it did not
measure; --resume with the same --out measures them and those that were cut, and tries the tiles
that were not tried. A contest that was killed at its time limit runs again only if --only names it.
--save changes only rows of the installed JAX: a finished contest replaces its row, and one in which
our kernel is wrong, or that crashed or hung, removes it. A contest that was cut changes no row.
"""

import contextlib
import json
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pallas_kernels.arguments import Parser, positive
from pallas_kernels.bench_plan import (
    CONTEST_S,
    Job,
    choose_contests,
    count_jobs,
    open_jobs,
    plan_lines,
    why_no_time,
)
from pallas_kernels.bench_results import (
    format_device,
    format_results,
    join_results,
    known_keys,
    mark_cut,
    mark_hung,
    merge_rows,
    read_results,
    stored_command,
)
from pallas_kernels.child_process import exit_on_sigterm
from pallas_kernels.contest import Contest
from pallas_kernels.contest_child import ContestJob, contests_of
from pallas_kernels.contest_process import Child
from pallas_kernels.kernel_choice import TUNED, minor_series, read_rows
from pallas_kernels.result_files import find_commit, lock_file, write_json


class Bench:
    """One run of the bench; the GPU is used only by its children.

    Raises:
        ValueError: see read_results; or the table is damaged.
    """

    def __init__(self, args: Namespace, folder: Path, show: Callable[[str], None]):
        self._args, self._folder, self._show = args, folder, show
        self._cache = Path(f"{args.out.absolute()}.cache") if args.out else folder / "cache"
        self._until = time.monotonic() + 60 * args.minutes
        self._children: list[Child] = []
        self._commit = find_commit()  # of this call: a later one may continue at another
        self.results = read_results(args.out if args.resume else None, args.tiny)
        self._rows = read_rows(TUNED)  # the children read them too

    def _left_s(self) -> float:
        return self._until - time.monotonic()

    def close(self) -> None:
        """Ends the children that still run."""
        for child in self._children:
            child.process.kill()

    def measure_device(self) -> None:
        """Measures the device and its ceilings.

        Raises:
            ValueError: the device cannot be used, or --out has results of another one or of
                another minor series of JAX.
        """
        device = self._start_child(ContestJob(tiny=self._args.tiny)).run(CONTEST_S)
        if "error" in device:
            raise ValueError(device["error"])
        before = device | self.results
        same_jax = minor_series(before["jax"]) == minor_series(device["jax"])
        if before["device"] != device["device"] or not same_jax:
            raise ValueError(
                f"--resume must continue on the same device with the same JAX; {self._args.out} is "
                f"of {before['device']}, jax {before['jax']}; this is {device['device']}, jax "
                f"{device['jax']}. Set another --out."
            )
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        self.results |= device | {"command": self._args.command, "date": date}
        if self._args.tiny:
            self.results["trial"] = "interpreted at tiny shapes; the times mean nothing"
        self._show(format_device(self.results))

    def run(self, contests: list[Contest]) -> None:
        """Runs the contests that are not done, in the order of bench_plan.open_jobs."""
        args, stored = self._args, self.results["contests"]
        known = known_keys(self._rows, self.results["chip"], self.results["jax"])
        jobs = open_jobs(contests, stored, args.tune, again=bool(args.only), known=known)
        hung = {name for name, result in stored.items() if "hung" in result}
        opened = {job.contest.name for job in jobs}
        if kept := [contest.name for contest in contests if contest.name not in opened]:
            of_all = f"{len(kept)} of {len(contests)} contests, which are kept"
            self._show(f"{args.out} has the results of {of_all}")
        for name in hung.intersection(kept):
            self._show(f"{name}: {stored[name].get('tuning_error') or stored[name]['error']}")
        for line in plan_lines(jobs, self._left_s() / 60):
            self._show(line)
        self._write(contests, jobs)
        self._run_jobs(jobs, contests)

    def _run_jobs(self, jobs: Sequence[Job], contests: list[Contest]) -> None:
        """Runs jobs one after the other, and writes the results after each."""
        stored, failed, taken_s = self.results["contests"], {}, []
        left = list(jobs)  # what another call has to do
        waiting = self._start(jobs[0]) if jobs else None
        for i, job in enumerate(jobs):
            child, waiting = waiting, self._start(jobs[i + 1]) if i + 1 < len(jobs) else None
            name = job.contest.name
            no_time = why_no_time(taken_s, self._left_s(), self._args.minutes)
            if child is None or no_time or name in failed:
                why = f"{'tuned' if job.tune else 'measured'}, {failed.get(name, no_time)}"
                self._show(f"{name}: not {why}")
                if child:
                    child.process.kill()
                continue
            start_s = time.monotonic()
            result = stored[name] = self._run_job(job, child)
            if result.get("done") and not job.tune:
                taken_s.append(time.monotonic() - start_s)
            if {"hung", "error", "tuning_error"} & result.keys():
                failed[name] = "it hung" if "hung" in result else "it crashed"
            if name in failed:
                left = [other for other in left if other.contest.name != name]
            elif "cut" not in result and not (job.tune and result.get("untried")):
                left.remove(job)
            self._show(
                "\n".join(format_results(job.contest, result, self.results, self._args.tiny))
            )
            self._write(contests, left)
        if left:
            texts = ", ".join(count_jobs(left))
            self._show(f"left: {texts}; --resume with the same --out continues")

    def _run_job(self, job: Job, child: Child) -> dict[str, Any]:
        """Returns the contest's result: of one that was measured before, together with that."""
        limit_s, left_s = job.limit_s, max(self._left_s(), 1.0)
        result = child.run(min(limit_s, left_s))
        if child.was_killed and limit_s <= left_s:
            result = mark_hung(result, limit_s, self._commit)
        elif child.was_killed:
            result = mark_cut(result, left_s)
        result |= {"date": self.results["date"], "commit": self._commit}
        return join_results(self.results["contests"].get(job.contest.name, {}), result, job.tune)

    def _start_child(self, job: ContestJob) -> Child:
        self._children.append(Child(job, self._folder, self._cache))
        return self._children[-1]

    def _start(self, job: Job) -> Child | None:
        if self._left_s() < 0:
            return None
        name = job.contest.name
        tried = self.results["contests"].get(name, {}).get("tried", {})
        return self._start_child(ContestJob(name, job.tune_s, self._args.tiny, tried))

    def _write(self, contests: list[Contest], left: Sequence[Job]) -> None:
        self.results["left"] = count_jobs(left)
        if self._args.out:
            write_json(self._args.out, self.results)
        if self._args.save:
            path = TUNED / f"{self.results['chip']}.json"
            old = json.loads(path.read_text()) if path.exists() else []
            write_json(path, merge_rows(old, contests, self.results))


def bench(args: Namespace, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs all contests, or as many as the time allows, and returns the results that it writes.

    Raises:
        ValueError: see Bench and its methods; or --only names no contest, or --out is a folder.
        OSError: --out or the table cannot be written, or another bench writes --out.
    """

    def show_lines(text: str) -> None:  # every line of a trial says that it is one
        show("\n".join(f"{'trial: ' * args.tiny}{line}" for line in text.split("\n")))

    contests = choose_contests(contests_of(args.tiny), args.only)
    if args.out and args.out.is_dir():
        raise ValueError(f"--out must be a file; got the folder {args.out}.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(exit_on_sigterm())
        if args.out:
            stack.enter_context(lock_file(args.out))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        run = Bench(args, Path(folder), show_lines)
        stack.callback(run.close)
        run.measure_device()
        run.run(contests)
    return run.results


def parse(argv: list[str] | None = None) -> Namespace:
    """Parses the command line."""
    parser = Parser("python -m pallas_kernels.bench", __doc__)
    parser.add_argument(
        "--minutes",
        type=positive(float),
        default=10.0,
        help="how long contests may run; default: 10",
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
        "--out",
        type=Path,
        help="write all results to this JSON file after every contest, and compiled programs to "
        "the folder OUT.cache",
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
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command = stored_command(argv)
    if args.tiny and args.save:
        parser.error("--tiny measures nothing useful: leave out --save.")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the file to continue.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        bench(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except BlockingIOError:
        sys.exit(f"error: --out {args.out} is in use by another bench. Wait for its end.")
    except OSError as error:
        flags = " or ".join([f"--out {args.out}"] * bool(args.out) + ["--save"] * args.save)
        sys.exit(f"error: {flags} must be writable; got {error}")
    except KeyboardInterrupt:
        print("interrupted; --resume with the same --out continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()

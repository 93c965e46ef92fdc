"""The child process of bench that runs one contest: compares with float64, then times, or tunes.

    python -m pallas_kernels.contest_child JOB.json RESULT.json

It waits for a line on stdin before it uses the GPU's time, so that its imports overlap with the
contest before it. The line has the seconds after which it will be killed. The implementations that
are known to work come first. The result file is replaced after each of them, so a kernel that hangs
or crashes costs only its own row.
"""

import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import torch_contests
from pallas_kernels.chip import detect_chip
from pallas_kernels.contest import Contest
from pallas_kernels.contest_sizes import TINY, Sizes
from pallas_kernels.contests import build_contests
from pallas_kernels.correctness import SEEDS, compare, exact_results
from pallas_kernels.kernel_choice import choose_body
from pallas_kernels.result_files import read_object, write_json
from pallas_kernels.search_space import default_bodies, shortlist
from pallas_kernels.tiles import OpTiles, body_of, describe_tiles, replace_tiles
from pallas_kernels.timing import first_line, measure_ceilings, time_calls

# An implementation that is compiled to compute all inputs' results in one call. It reads several
# inputs in turn, so that none of them stays in the L2 cache.
Compiled = Callable[[], list[Any]]
CLEARLY = 0.99  # a candidate replaces the best tiles if it takes less than this share of their time
TOGETHER = "the fastest of all kernels together"  # the last of `untried`
GROUP = 4  # candidates that are compiled at the same time, and timed before the next are compiled


@dataclasses.dataclass(frozen=True)
class ContestJob:
    """The work of one child."""

    name: str = ""  # of the contest; "" only measures the device
    # Seconds for trying the shortlist. With 0, our kernel (at its default and stored tiles) and all
    # others are measured. Otherwise an earlier job has done that: only our kernel is measured
    # again, then tuned.
    tune_s: float = 0.0
    tiny: bool = False  # interprets the kernels at tiny shapes
    # {candidate: seconds, or why there is no time}, of the shortlist: from earlier tuning
    tried: dict[str, Any] = dataclasses.field(default_factory=dict)


def contests_of(tiny: bool) -> list[Contest]:
    """Returns all contests, or those of a trial."""
    return build_contests(TINY if tiny else Sizes(), tiny)


def find_contest(job: ContestJob) -> Contest:
    """Returns the contest of a job."""
    return next(contest for contest in contests_of(job.tiny) if contest.name == job.name)


def describe_device(tiny: bool) -> dict[str, Any]:
    """Returns the device and its ceilings."""
    device = jax.devices()[0]
    chip = None if tiny else detect_chip(device)
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "chip": chip.name if chip else "",
        "arch": chip.arch if chip else "sm_86",
        **measure_ceilings(256 if tiny else 8_192),
    }


def bodies(contest: Contest, arch: str, chip: str) -> dict[str, OpTiles | None]:
    """Returns {body: tiles}: each body's default tiles, and "stored" where training uses others.

    An op without tiles has one body, in Triton. Without the stored tiles, a run at the defaults
    would replace better ones in the table.

    Args:
        chip: a name of the chip table; "" for a trial, which leaves out Mosaic's bodies, whose
            smallest tiles are larger than its arrays.
    """
    tiles = default_bodies(contest.op, arch, contest.shape)
    found = dict(zip(("triton", "mosaic") if chip else ("triton",), tiles, strict=False))
    stored = choose_body(
        contest.op,
        arch,
        chip,
        "bfloat16",
        contest.shape,
        documents=contest.documents,
        window=contest.window,
    ).tiles
    return found | ({} if stored in tiles else {"stored": stored})


class ContestRun:
    """One contest on this device: its inputs, their exact results, and what was measured."""

    def __init__(self, contest: Contest, save: Callable[[dict[str, Any]], None]):
        self.contest, self._save = contest, save
        self.results: dict[str, Any] = {"contestants": {}}
        self._start_s = time.monotonic()
        arrays = jax.jit(contest.arrays)
        self.inputs = [arrays(jax.random.key(seed)) for seed in SEEDS]
        self._exact = [exact_results(contest, arrays) for arrays in self.inputs]

    def save(self) -> None:
        self._save(self.results)

    def record(self, name: str, value: Any) -> None:
        """Stores a contestant's timing, or the reason why it has none; and when it was ready."""
        self.results["contestants"][name] = value
        seconds = round(time.monotonic() - self._start_s, 1)
        self.results.setdefault("seconds", {})[name] = seconds
        self.save()

    def _compile(self, function) -> Compiled | str:
        once = jax.jit(function)  # is traced and lowered once for all inputs
        every = jax.jit(lambda inputs: [once(*arrays) for arrays in inputs])
        try:
            return functools.partial(every.lower(self.inputs).compile(), self.inputs)
        except Exception as error:  # one failure must not stop a comparison
            return first_line(error)

    def compile_all(self, functions: dict[str, Callable]) -> dict[str, Compiled | str]:
        """Compiles functions at the same time, on several processor cores."""
        with ThreadPoolExecutor(min(len(functions), os.cpu_count() or 1)) as pool:
            return dict(zip(functions, pool.map(self._compile, functions.values()), strict=True))

    def measure(
        self, compiled: Compiled | str, ours: bool, samples: int = 20
    ) -> dict[str, Any] | str:
        """Returns the timing and the distances from float64, or the reason why there is none.

        A faulty kernel of ours is not timed. Another implementation is, and its fault is stored.

        Args:
            ours: see correctness.compare.
        """
        if isinstance(compiled, str):
            return compiled
        try:
            found = compare(self.contest, compiled, self._exact, ours)
            if ours and found.fault:
                return f"wrong: {found.fault}"
            timing = time_calls(compiled, samples).divided(len(self.inputs))
        except Exception as error:
            return first_line(error)
        return timing._asdict() | {"distances": found.distances, "fault": found.fault}


def _seconds(result) -> float:
    return result["median_s"] if isinstance(result, dict) else float("inf")


def tune(
    run: ContestRun,
    arch: str,
    best: dict[str, Any],
    *,
    until: float,
    deadline: float,
    group_s: float,
) -> OpTiles | None:
    """Returns the tiles of each kernel that were fastest, found one kernel at a time.

    Candidates that run.results["tried"] has are not tried again. Those for which there was no time
    stay in run.results["untried"], of which the last is TOGETHER until the caller removes it.

    Args:
        best: the result of the fastest body without tuning.
        until: the value of time.monotonic() after which no group of candidates starts.
        deadline: that at which this process is killed. The last group ends so early that the
            fastest tiles of all kernels can be compiled and timed together.
        group_s: how long a group probably takes.
    """
    contest = run.contest
    masked = contest.documents or bool(contest.window)
    candidates = {}  # name -> (kernel, tiles, tiles of all kernels)
    for kernel, tiles in shortlist(contest.op, arch, contest.shape, masked):
        all_tiles = replace_tiles(best["tiles"], kernel, tiles)
        if all_tiles != best["tiles"]:
            name = f"{kernel} {body_of(tiles)} {describe_tiles(tiles)}"
            candidates[name] = kernel, tiles, all_tiles
    tried = run.results["tried"]
    untried = run.results["untried"] = [n for n in candidates if n not in tried] + [TOGETHER]
    run.save()
    while group := [name for name in untried[:GROUP] if name != TOGETHER]:
        start_s = time.monotonic()
        if start_s > until or start_s + 2 * group_s > deadline:
            break
        functions = {name: contest.kernel(candidates[name][2]) for name in group}
        for name, compiled in run.compile_all(functions).items():
            run.results["running"] = name  # join_results blames it if it ends the process
            run.save()
            result = run.measure(compiled, ours=True, samples=10)
            del run.results["running"]
            tried[name] = result if isinstance(result, str) else result["median_s"]
            untried.remove(name)
            run.save()
        group_s = max(group_s, time.monotonic() - start_s)
    chosen = {}  # kernel -> (seconds, tiles)
    for name, (kernel, tiles, _) in candidates.items():
        seconds = tried.get(name)
        least_s, _ = chosen.get(kernel, (CLEARLY * best["median_s"], None))
        if isinstance(seconds, float) and seconds < least_s:
            chosen[kernel] = seconds, tiles
    all_tiles = best["tiles"]
    for kernel, (_, tiles) in chosen.items():
        all_tiles = replace_tiles(all_tiles, kernel, tiles)
    return all_tiles


def run_contest(
    job: ContestJob, save: Callable[[dict[str, Any]], None], limit_s: float = math.inf
) -> None:
    """Runs a job's contest; calls `save` with all results so far after each contestant.

    Args:
        limit_s: the seconds from now after which this process is killed.
    """
    start_s = time.monotonic()
    arch, chip = ("sm_86", "") if job.tiny else (detect_chip().arch, detect_chip().name)
    contest = find_contest(job)
    run, own = ContestRun(contest, save), bodies(contest, arch, chip)
    kernels = {body: contest.kernel(tiles) for body, tiles in own.items()}
    others = {} if job.tune_s else contest.others
    compile_s = time.monotonic()
    compiled = run.compile_all(others | kernels)
    for name in others:
        run.record(name, run.measure(compiled[name], ours=False))
    if not job.tune_s:
        for name, timing in torch_contests.measure_torch(
            contest, run.inputs, "cpu" if job.tiny else "cuda"
        ):
            run.record(name, timing if isinstance(timing, str) else timing._asdict())

    def record_ours(name, compiled, tiles):
        result = run.measure(compiled, ours=True)
        run.record(name, result if isinstance(result, str) else result | {"tiles": tiles})

    for body, tiles in own.items():
        record_ours(body, compiled[body], tiles)
    best = min((run.results["contestants"][body] for body in own), key=_seconds)
    if job.tune_s:  # stored also without a correct kernel, so that --resume does not try again
        run.results |= {"tried": dict(job.tried), "untried": []}
    if job.tune_s and not isinstance(best, str):
        now_s = time.monotonic()
        tiles = tune(
            run,
            arch,
            best,
            until=now_s + job.tune_s,
            deadline=start_s + limit_s,
            group_s=now_s - compile_s,  # as long as the bodies without tuning took
        )
        if tiles != best["tiles"]:
            (tuned,) = run.compile_all({"tuned": contest.kernel(tiles)}).values()
            record_ours("tuned", tuned, tiles)
        if run.results["untried"] == [TOGETHER]:
            run.results["untried"] = []
    run.results["done"] = True
    run.save()


def main(argv: Sequence[str]) -> None:
    job = ContestJob(**read_object(Path(argv[1])))
    jax.devices()  # starts CUDA
    if job.name and not job.tune_s and torch_contests.takes_part(find_contest(job)):
        torch_contests.import_torch()  # after JAX, which so loads its own cuDNN
    line = sys.stdin.readline()
    if not line:
        return  # the parent ended
    if job.name:
        save = lambda results: write_json(Path(argv[2]), results)
        run_contest(job, save, limit_s=float(line))
    else:
        write_json(Path(argv[2]), describe_device(job.tiny))


if __name__ == "__main__":
    main(sys.argv)

"""Runs the child processes of the GPU suites: the job that a child reads, and its result.

A child is one process of one framework, so that JAX and PyTorch never hold GPU memory together. It
reads a BenchJob as JSON and writes one result as JSON. This module imports neither framework.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxtrain.config import train_config as config_lib
from jaxtrain.config.train_config import TrainConfig
from jaxtrain.files import strict_json, write_atomic
from pallas_kernels.child_process import ChildProcess, exit_on_sigterm, last_lines
from pallas_kernels.result_files import read_object

# Sizes for --tiny, which tests a suite on any processor; its figures mean nothing.
TINY = dict(L=1, D=32, F=64, H=4, G=2, K=16, V=256)
TINY_T = 16

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BenchJob:
    """The work of one child; which fields it reads depends on `kind`."""

    kind: str  # a key of the child's KINDS
    size: str = ""  # name of a shipped config
    optimizer: str = "muon"
    batch: int = 0  # sequences per step; 0 takes the config's
    rows: int = 0  # sequences per micro-batch
    most_s: float = 0.0  # time for counted steps; step_timing.LEAST_STEPS always run
    tiny: bool = False
    usable_bytes: int = 0  # a program that needs more is not run; 0 sets no limit
    cache: str = ""  # folder of the compilation cache
    trace: str = ""  # folder for a profiler trace
    options: dict = dataclasses.field(default_factory=dict)  # XLA compiler options
    began: float = 0.0  # Unix time at which the child was started
    seeds: tuple = ()
    steps: int = 0
    data: dict = dataclasses.field(default_factory=dict)  # fields of DataConfig, for real text
    shards: tuple = ()  # paths of token shards, in their order
    folder: str = ""  # shared by the children of one suite


def job_config(job: BenchJob) -> TrainConfig:
    """Returns the config of a job's size with the job's settings, shrunk if it is tiny."""
    config = importlib.import_module(f"configs.{job.size}").get_config()
    if job.tiny:
        config.model.update(TINY)
        config.model.G = TINY["G"] if config.model.position == "rope" else TINY["H"]
        config.data.update(batch=2, seq_len=TINY_T)
        config.accumulation = 1
    config.optim.name = job.optimizer
    config.data.update(job.data)
    if job.batch:
        config.data.batch, config.accumulation = job.batch, job.batch // job.rows
    config.compile_cache = job.cache
    if job.steps:
        config.steps = job.steps
        config.optim.warmup_steps = min(config.optim.warmup_steps, job.steps // 10)
    return config_lib.freeze(config)


def _kill_marked(mark: str) -> None:
    """Kills all processes of this user that have `mark` among their environment's entries."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            if mark.encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def run_process_group(
    argv: Sequence[str], output: TextIO, limit_s: float, env: Mapping[str, str] | None
) -> int | None:
    """Runs a process and returns its exit status; kills it and returns None after limit_s.

    At its end all processes that it started are killed: torch.compile's workers would otherwise
    live on and slow the next child. Those that started sessions of their own, as the children of a
    suite do, are found by a variable that only this process and its descendants have. Ctrl-C and
    SIGTERM end them too.
    """
    name = f"JAXTRAIN_CHILD_{uuid.uuid4().hex}"
    env = dict(os.environ if env is None else env) | {name: "1"}
    try:
        with exit_on_sigterm():
            return ChildProcess(argv, output, env).wait(limit_s)
    finally:
        _kill_marked(f"{name}=1")


def run_child(
    module: str, job: BenchJob, folder: Path, limit_s: float, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs `python -m jaxtrain.benchmarks.MODULE` and returns its result, or {"error": reason}.

    If the child was killed or crashed after it had stored a part of its result, then that part is
    returned, with "incomplete": reason. The error of a child that was killed after limit_s, before
    it stored anything, has "timed_out": true.

    Args:
        folder: for the job, the result and the child's output.
        limit_s: the child is killed after this time.
        env: variables added to this process's environment.
    """
    job_path, result_path = folder / "job.json", folder / "result.json"
    result_path.unlink(missing_ok=True)
    job = dataclasses.replace(job, began=time.time())
    write_atomic(job_path, strict_json(dataclasses.asdict(job)))
    argv = [sys.executable, "-m", f"jaxtrain.benchmarks.{module}", str(job_path), str(result_path)]
    with open(folder / "output.txt", "w") as output:
        status = run_process_group(argv, output, limit_s, os.environ | (env or {}))
    reason = ""
    if status is None:
        reason = f"killed: it took more than the {limit_s:.0f} s that it was given"
    elif status:
        reason = f"exit status {status}: {last_lines(folder / 'output.txt', 600)}"
    try:
        result = read_object(result_path)
    except (OSError, ValueError) as error:
        failure = {"error": reason or f"no result: {error}"}
        return failure | ({"timed_out": True} if status is None else {})
    return result | ({"incomplete": reason} if reason else {})


def child_main(
    kinds: Mapping[str, Callable[[BenchJob], Result | Iterator[Result]]],
    is_oom: Callable[[Exception], bool],
) -> None:
    """Runs a child: does the job in the file argv[1] and writes its result to argv[2].

    If the device runs out of memory before a result is stored, the result is {"oom": reason}.

    Args:
        kinds: the function for each BenchJob.kind. It returns the result, or yields what it has
            measured so far, so that run_child has that if the child is killed or crashes.
        is_oom: whether an error means that the device ran out of memory.
    """
    values = json.loads(Path(sys.argv[1]).read_text())
    job = BenchJob(**values | {name: tuple(values[name]) for name in ("seeds", "shards")})
    path, stored = Path(sys.argv[2]), False
    try:
        returned = kinds[job.kind](job)
        for result in [returned] if isinstance(returned, dict) else returned:
            write_atomic(path, strict_json(result))
            stored = True
    except Exception as error:
        if stored or not is_oom(error):
            raise
        write_atomic(path, strict_json({"oom": str(error).splitlines()[0][:300]}))

"""What a child of the GPU suites is told, and what both frameworks share: no JAX, no torch.

A child is one process of one framework, so that neither holds the memory of the other. It reads a
BenchJob as JSON and writes one result, a dict; it never waits for another child.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jaxtrain.config import train_config as config_lib
from jaxtrain.files import strict_json, write_atomic

WARM_UP = 2  # steps that are not counted
LEAST, MOST = 5, 20  # counted steps
SMI_S = 20.0  # for nvidia-smi, which wakes the driver where persistence mode is off
TINY = dict(L=1, D=32, F=64, H=4, G=2, K=8, V=256)  # of --tiny: any processor, no figure counts
TINY_T = 16
CLOCKS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
)


@dataclasses.dataclass(frozen=True)
class BenchJob:
    """One child's work; which fields it reads depends on its kind."""

    kind: str  # a key of the child's KINDS
    size: str = ""  # of configs/
    optimizer: str = "muon"
    batch: int = 0  # sequences a step; 0 is the config's
    rows: int = 0  # of them in a micro-batch
    most_s: float = 0.0  # of counted steps; LEAST are made in any case
    tiny: bool = False
    usable_bytes: int = 0  # a program that wants more is not run; 0: no limit
    cache: str = ""  # of compiled programs
    trace: str = ""  # folder of a profiler trace
    options: dict = dataclasses.field(default_factory=dict)  # of XLA
    began: float = 0.0  # when the child was started, UTC s
    seeds: tuple = ()
    steps: int = 0
    data: dict = dataclasses.field(default_factory=dict)  # of DataConfig, for real text
    shards: tuple = ()  # of real text, in their order
    folder: str = ""  # that children of one suite share


def config_of(job: BenchJob):
    """The TrainConfig of a job: a shipped config, or with tiny its form at TINY's sizes."""
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


def zipf_tokens(seed: int, batch: int, seq_len: int, V: int) -> np.ndarray:
    """int32 [batch, seq_len + 1], frequencies as in text: rank r has a share of 1 / (r + 2.7).

    Source: Mandelbrot 1953, as in Manning & Schuetze 1999, section 1.4.3.
    """
    share_V = 1 / (np.arange(V) + 2.7)
    edges_V = np.cumsum(share_V / share_V.sum())
    rng = np.random.default_rng(seed)
    rank = np.searchsorted(edges_V, rng.random((batch, seq_len + 1))).clip(max=V - 1)
    return np.random.default_rng(0).permutation(V)[rank].astype(np.int32)


def pace(launch, wait, batches) -> tuple[list[float], list[float]]:
    """(seconds of each step, from arrival to arrival; CPU seconds of each launch).

    A step is launched before the one before it is waited for, as in training, so that the device
    never waits for the host and what a wait itself takes is in no step; the first one's time is
    from its launch. A launch's own thread is counted: sleeping where the device's queue is full is
    no work, but a driver that spins there is counted, so it is at most that.

    Args:
        launch: batch -> what wait takes.
    """
    steps_s, hosts_s, flying = [], [], None
    arrived_s = time.perf_counter()
    for batch in batches:
        start_s = time.thread_time()
        launched = launch(batch)
        hosts_s.append(time.thread_time() - start_s)
        if flying is not None:
            wait(flying)
            steps_s.append(time.perf_counter() - arrived_s)
            arrived_s = time.perf_counter()
        flying = launched
    wait(flying)
    return [*steps_s, time.perf_counter() - arrived_s], hosts_s


def spread(name: str, times_s) -> dict:
    """{name_s: median, name_range_s: [a tenth is below, a tenth is above]}, seconds."""
    low_s, median_s, high_s = np.percentile(times_s, (10, 50, 90)).tolist()
    return {f"{name}_s": median_s, f"{name}_range_s": [low_s, high_s]}


def measure_steps(job, cfg, launch, wait) -> dict:
    """Times of a job's steps, each on fresh tokens: seconds, and the first step's from `began`."""
    shape = job.batch, cfg.data.seq_len, cfg.model.V
    batches = lambda first, count: [zipf_tokens(first + i, *shape) for i in range(count)]
    wait(launch(batches(0, 1)[0]))
    first_s = time.time() - job.began
    warm_s, _ = pace(launch, wait, batches(1, WARM_UP))
    count = int(np.clip(job.most_s / min(warm_s), LEAST, MOST))
    steps_s, hosts_s = pace(launch, wait, batches(1 + WARM_UP, count))
    flying = launch(batches(1 + WARM_UP + count, 1)[0])
    found = {"clocks": clocks()}  # while a step runs, and no step is timed
    wait(flying)
    p50_s, p95_s = np.percentile(steps_s, (50, 95)).tolist()
    return found | {
        "first_step_s": first_s,
        "step_s": p50_s,
        "step_p95_s": p95_s,
        "host_s": float(np.median(hosts_s)),
        "samples": count,
        "tokens_per_step": job.batch * cfg.data.seq_len,
        "tokens_per_s": job.batch * cfg.data.seq_len / p50_s,
    }


def first_gpu(environ) -> str:
    """nvidia-smi's name (index, UUID) of the card that a process sees as its first."""
    return environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def clocks() -> str:
    """nvidia-smi's clocks, power and temperature of the first GPU, or why there are none."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    argv = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    argv.append(f"--id={first_gpu(os.environ)}")
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=SMI_S)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi: no answer in {SMI_S:g} s"
    said = done.stdout.strip()
    return said if done.returncode == 0 else f"nvidia-smi: {done.stderr.strip() or said}"


def run_group(argv, said, limit_s: float, env) -> int | None:
    """The exit status of a process, or None where it took more than limit_s and was killed.

    What it has started (torch.compile's workers) ends with it: nothing of it slows the next one.
    """
    child = subprocess.Popen(argv, stdout=said, stderr=said, env=env, start_new_session=True)
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is empty
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_child(module: str, job: BenchJob, folder: Path, limit_s: float, env=None) -> dict:
    """The result of `python -m jaxtrain.benchmarks.MODULE`, or {"error": its last words}.

    Args:
        folder: for the job, the result and what the child says.
        limit_s: after so long it is killed, which is an error too.
        env: over this process's variables.
    """
    paths = [folder / name for name in ("job.json", "result.json", "said.txt")]
    for path in paths:
        path.unlink(missing_ok=True)
    job = dataclasses.replace(job, began=time.time())
    write_atomic(paths[0], strict_json(dataclasses.asdict(job)))
    argv = [sys.executable, "-m", f"jaxtrain.benchmarks.{module}", *map(str, paths[:2])]
    with open(paths[2], "w+") as said:
        status = run_group(argv, said, limit_s, os.environ | (env or {}))
    if status is None:
        return {"error": f"killed: it took more than the {limit_s:.0f} s that were left"}
    if status == 0:
        return json.loads(paths[1].read_text())
    words = paths[2].read_text(errors="replace").strip().splitlines()[-3:]
    return {"error": f"exit status {status}: {' | '.join(words)[-600:]}"}


def child_main(kinds: dict, is_oom) -> None:
    """Does the job of argv[1], writes its result to argv[2]; out of memory is a result too.

    Args:
        kinds: {kind: function(BenchJob) -> dict}.
        is_oom: error -> whether the device's memory did not suffice.
    """
    values = json.loads(Path(sys.argv[1]).read_text())
    job = BenchJob(**values | {name: tuple(values[name]) for name in ("seeds", "shards")})
    try:
        found = kinds[job.kind](job)
    except Exception as error:
        if not is_oom(error):
            raise
        found = {"oom": str(error).splitlines()[0][:300]}
    write_atomic(sys.argv[2], strict_json(found))

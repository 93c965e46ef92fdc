"""Runs of configs/debug.py, in this process and in processes of their own."""

import atexit
import contextlib
import copy
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import xla_flags
from fork_server import Fork, ForkServer

from configs import debug
from jaxtrain.config.train_config import flatten, freeze
from jaxtrain.metrics.jsonl import read_metrics

ROOT = Path(__file__).parent.parent
# An ASCII locale; without these Python uses UTF-8 even in the C locale.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
DEADLINE_S = 240
# Values that are no part of a compiled step: it takes learning rates as arguments.
OUTSIDE_THE_STEP = {"workdir", "steps", "seed", "log_every", "eval_every", "save_every"}
OUTSIDE_THE_STEP |= {"eval_tokens", "data.text", "data.shards", "checkpoint.storage"}
OUTSIDE_THE_STEP |= {"optim.learning_rate", "optim.adam_learning_rate"}


def write_text(folder: Path) -> Path:
    """Writes a small text that a model can learn, some of which is held out."""
    path = folder / "text.txt"
    path.write_text("".join(f"{a} plus {b} is {a + b}\n" for a in range(60) for b in range(60)))
    return path


def debug_config(workdir, text, **values):
    """Returns configs/debug.py as a TrainConfig; SECTION__FIELD sets a value of a section."""
    config = debug.get_config()
    config.data.text = str(text)
    for name, value in {"workdir": str(workdir), "compile_cache": "", **values}.items():
        section, _, field = name.rpartition("__")
        setattr(config[section] if section else config, field, value)
    return freeze(config)


@contextlib.contextmanager
def shared_steps():
    """Lets equal steps of this process's runs be compiled once: a third of a short run's time."""
    from jaxtrain.training import programs  # tests without a run need not import it

    compile_step, compiled = programs.compile_step, {}

    def share(run):
        values = {k: v for k, v in flatten(run.cfg).items() if k not in OUTSIDE_THE_STEP}
        key = repr(values), run.mesh
        if key not in compiled:
            compiled[key] = compile_step(run)
            return compiled[key]
        step = copy.copy(compiled[key])
        step.compile_s = 0.0
        return step

    programs.compile_step = share
    try:
        yield
    finally:
        programs.compile_step = compile_step


def free_port() -> int:
    """Returns a port of this host that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def flags_of_processes(count: int) -> list[list[str]]:
    """Returns each process's flags of a run of several processes on this host."""
    shared = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"]
    return [[*shared, f"--process={i}"] for i in range(count)]


def command(workdir, text, *flags, devices=1):
    argv = [sys.executable, "-m", "jaxtrain.train", "--config=configs/debug.py"]
    argv += [f"--config.workdir={workdir}", f"--config.data.text={text}"]
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # see conftest.py
        argv += [f"--config.compile_cache={cache}"]
    argv += flags
    return argv, os.environ | {"XLA_FLAGS": xla_flags.flags(devices)}


@functools.cache
def _fork_server() -> ForkServer:
    modules = ("jaxtrain.train", "jaxtrain.evaluate", "jaxtrain.generate")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    server = ForkServer(*modules, "matplotlib.backends.backend_agg", env=env)
    atexit.register(server.close)
    return server


def fork(workdir, text, *flags, devices=1) -> Fork:
    """Starts a run like `start`, in a fork of a process that has imported everything."""
    argv, env = command(workdir, text, *flags, devices=devices)
    return fork_command("train", *argv[3:], env=env)


def fork_command(name: str, *arguments: str, env: dict[str, str] | None = None) -> Fork:
    """Starts python -m jaxtrain.NAME with these arguments in such a fork.

    Settings that Python reads when it starts, such as PYTHONUTF8, have no effect.
    """
    program = f"import sys\nfrom jaxtrain.{name} import command\n"
    program += f"sys.orig_argv[1:1] = ['-m', 'jaxtrain.{name}']\ncommand()"
    return fork_program(program, *arguments, env=env)


def fork_cli(*arguments, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Fork:
    """Starts `jaxtrain` with these arguments in such a fork."""
    program = f"import os\nos.chdir({str(cwd)!r})\nfrom jaxtrain.cli import main\n"
    return fork_program(program + "raise SystemExit(main())", *arguments, env=env)


def fork_program(program: str, *arguments, env: dict[str, str] | None = None) -> Fork:
    """Starts a Python program, which may import the tests' modules, in such a fork."""
    reads_env = "from jaxtrain.distributed.heartbeat import beat\nbeat.__init__()\n"
    env = dict(env or os.environ)
    return _fork_server().start(reads_env + program, *map(str, arguments), env=env)


def start(workdir, text, *flags, devices=1):
    argv, env = command(workdir, text, *flags, devices=devices)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def finish(process, status=0):
    """Returns the output of a process or a fork; fails unless it ended with `status`."""
    out, err = process.communicate(timeout=DEADLINE_S)
    out += err or ""  # a process that `start` started writes both to `out`
    assert process.returncode == status, out
    return out


def signal_at(process, workdir, step, number=signal.SIGKILL):
    """Sends a signal as soon as `step` is logged."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        records = read_metrics(path) if path.exists() else []
        if records and records[-1]["step"] >= step:
            process.send_signal(number)
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def losses(workdir):
    """Returns (step, loss) of every logged training step."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [(r["step"], r["train/loss_nats"]) for r in records if "train/loss_nats" in r]


def phase_of(beats: Path) -> str:
    """Returns the phase in a process's JAXTRAIN_BEAT file; "" if there is none yet."""
    try:
        return json.loads(beats.read_text())["phase"]
    except (FileNotFoundError, ValueError):  # not yet written, or being written
        return ""


def slow_down(pid: int, is_over, running_s: float) -> None:
    """Stops a process for 20 ms after each running_s, until is_over()."""
    while not is_over():
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.020)
        os.kill(pid, signal.SIGCONT)
        time.sleep(running_s)

"""Runs of configs/debug.py, in this process and in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import xla_flags

from configs import debug
from jaxtrain.config.train_config import freeze
from jaxtrain.metrics.jsonl import read_metrics

ROOT = Path(__file__).parent.parent
DEADLINE_S = 240


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
    argv += [f"--config.workdir={workdir}", f"--config.data.text={text}", *flags]
    return argv, os.environ | {"XLA_FLAGS": xla_flags.flags(devices)}


def start(workdir, text, *flags, devices=1):
    argv, env = command(workdir, text, *flags, devices=devices)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def finish(process, status=0):
    """Returns the process's output; fails unless it ended with `status`."""
    out, _ = process.communicate(timeout=DEADLINE_S)
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

"""Whole runs in processes of their own, for the tests that kill them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import xla_flags

from jaxtrain.metrics.jsonl import read_metrics

ROOT = Path(__file__).parent.parent
DEADLINE_S = 240


def write_text(folder: Path) -> Path:
    """A small text: arithmetic that a model can learn, some of it held out."""
    path = folder / "text.txt"
    path.write_text("".join(f"{a} plus {b} is {a + b}\n" for a in range(60) for b in range(60)))
    return path


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
    """The process's output; fails unless it ended with `status`."""
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status, out
    return out


def signal_at(process, workdir, step, number=signal.SIGKILL):
    """Sends a signal once `step` is logged."""
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
    """(step, loss) of every logged training step."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [(r["step"], r["train/loss_nats"]) for r in records if "train/loss_nats" in r]


def phase_of(beats: Path) -> str:
    """The phase that a process names in the file of its JAXTRAIN_BEAT."""
    try:
        return json.loads(beats.read_text())["phase"]
    except (FileNotFoundError, ValueError):  # not yet written, or being written
        return ""

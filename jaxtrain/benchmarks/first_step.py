"""Suite startup: from process start to the first finished step of a config.

Three starts a round, each a process of its own:

    first     nothing kept: text is encoded, every program compiled
    programs  the compile cache of the first, another run folder: text is encoded again
    second    the compile cache and the encoded text of the first
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxtrain.benchmarks.timing import verdict
from jaxtrain.reporting.table import format_table

CONFIG = "configs/quickstart.py"
FLAGS = ("log_every=1",)
MOST_OF_FIRST = 0.5
# The command as a user gives it, after a note of when its imports were done.
CHILD = """
import runpy, sys, time
import jaxtrain.train
print("imported", time.time(), flush=True)
del sys.modules["jaxtrain.train"]
runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)
"""


POLL_S = 0.05  # between looks at the child's metrics; the times in them are its own


def _first_step(workdir: Path) -> float | None:
    """When the run's first step was through, as its metrics.jsonl has it; None before that."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # whole lines only
    for record in map(json.loads, lines):
        if record["step"] == 1 and "train/loss_nats" in record:
            return record["time"]
    return None


def start(workdir: Path, cache: Path, config: str) -> dict[str, float]:
    """Seconds of one start: imports, and from process start to the first step's result.

    The run is killed after that step.

    Raises:
        RuntimeError: the process ended before its first step.
    """
    flags = [f"workdir={workdir}", f"compile_cache={cache}", *FLAGS]
    command = [sys.executable, "-c", CHILD, f"--config={config}"]
    command += [f"--config.{flag}" for flag in flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryFile("w+") as output:
        began, stepped = time.time(), None
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        while stepped is None and process.poll() is None:
            time.sleep(POLL_S)
            stepped = _first_step(workdir)
        process.kill()
        process.wait()
        output.seek(0)
        text = output.read()
    stepped = stepped or _first_step(workdir)
    if stepped is None:
        raise RuntimeError(
            f"{config} must train a step; it exited {process.returncode}:\n{text[-2_000:]}"
        )
    imported = float(re.search(r"^imported (\S+)$", text, re.MULTILINE)[1])
    return {"imports_s": imported - began, "first_step_s": stepped - began}


def _one_round(folder: Path, config: str) -> dict[str, dict]:
    cache, workdir = folder / "cache", folder / "run"
    times = {"first": start(workdir, cache, config)}
    times["programs"] = start(folder / "other", cache, config)
    for entry in workdir.iterdir():  # all but the text in tokens: a run that has not begun
        if entry.name != "data":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return times | {"second": start(workdir, cache, config)}


def run(rounds: int, config: str = CONFIG) -> list[dict]:
    """Rows of the three starts: medians over `rounds`, every round with a cache of its own."""
    taken = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            taken.append(_one_round(Path(folder), config))
    rows = []
    for variant in taken[0]:
        row = {"suite": "startup", "case": config, "variant": variant, "samples": rounds}
        for name in ("imports_s", "first_step_s"):
            row[name] = statistics.median(times[variant][name] for times in taken)
        row["after_imports_s"] = row["first_step_s"] - row["imports_s"]
        rows.append(row)
    for row in rows:
        row["of_first"] = row["first_step_s"] / rows[0]["first_step_s"]
        row["of_first_after_imports"] = row["after_imports_s"] / rows[0]["after_imports_s"]
    return rows


def show(rows) -> str:
    return format_table(
        rows,
        {
            "case": lambda r: r["case"],
            "start": lambda r: r["variant"],
            "to first step s": lambda r: f"{r['first_step_s']:.2f}",
            "of first": lambda r: f"{r['of_first']:.2f}",
            "imports s": lambda r: f"{r['imports_s']:.2f}",
            "after imports s": lambda r: f"{r['after_imports_s']:.2f}",
            "of first's": lambda r: f"{r['of_first_after_imports']:.2f}",
            "n": lambda r: str(r["samples"]),
            "target": lambda r: (
                verdict(r["of_first"], MOST_OF_FIRST, at_most=True)
                if r["variant"] == "second"
                else ""
            ),
        },
    )

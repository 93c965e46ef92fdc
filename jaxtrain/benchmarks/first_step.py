"""Suite startup: the time from the start of a process to the end of a config's first step.

A round has three starts, each in a new process:

    first     nothing is cached: text is encoded and every program is compiled
    programs  with the first start's compilation cache, in another run folder: text is encoded again
    second    with the first start's compilation cache and its encoded text
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.benchmarks.timing import target_verdict
from jaxtrain.reporting.table import format_table

CONFIG = "configs/quickstart.py"
MOST_OF_FIRST = 0.5  # target: the second start's time over the first's
POLL_S = 0.05  # between two looks at the child's metrics, which contain the exact times
# Imports the command, prints the time, and runs it as `python -m` does.
CHILD = """
import runpy, sys, time
import jaxtrain.train
print("imported", time.time(), flush=True)
del sys.modules["jaxtrain.train"]
runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)
"""


def _first_step_time(workdir: Path) -> float | None:
    """Returns the time at which the run finished its first step; None if it has not yet."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # without an incomplete line
    for record in map(json.loads, lines):
        if record["step"] == 1 and "train/loss_nats" in record:
            return record["time"]
    return None


def time_start(workdir: Path, cache: Path, config: str) -> dict[str, float]:
    """Returns the seconds from process start to the end of the imports and of the first step.

    The run is killed after that step.

    Raises:
        RuntimeError: the process ended before its first step.
    """
    command = [sys.executable, "-c", CHILD, f"--config={config}", "--config.log_every=1"]
    command += [f"--config.workdir={workdir}", f"--config.compile_cache={cache}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryFile("w+") as output:
        began, first_step = time.time(), None
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        while first_step is None and process.poll() is None:
            time.sleep(POLL_S)
            first_step = _first_step_time(workdir)
        process.kill()
        process.wait()
        output.seek(0)
        printed = output.read()
    first_step = first_step or _first_step_time(workdir)
    if first_step is None:
        raise RuntimeError(
            f"{config} must train a step; it exited {process.returncode}:\n{printed[-2_000:]}"
        )
    match = re.search(r"^imported (\S+)$", printed, re.MULTILINE)
    assert match, "CHILD prints this line before it trains"
    imported = float(match[1])
    return {"imports_s": imported - began, "first_step_s": first_step - began}


def _time_round(folder: Path, config: str) -> dict[str, dict]:
    cache, workdir = folder / "cache", folder / "run"
    times = {"first": time_start(workdir, cache, config)}
    times["programs"] = time_start(folder / "other", cache, config)
    for entry in workdir.iterdir():  # deletes all but the text, so that the run starts at step 0
        if entry.name != "data":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return times | {"second": time_start(workdir, cache, config)}


def measure(rounds: int, config: str = CONFIG) -> list[dict[str, Any]]:
    """Returns a row for each of the three starts: medians over rounds, each with its own cache."""
    taken = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            taken.append(_time_round(Path(folder), config))
    rows: list[dict[str, Any]] = []
    for variant in taken[0]:
        row = {"suite": "startup", "case": config, "variant": variant, "samples": rounds}
        for name in ("imports_s", "first_step_s"):
            row[name] = statistics.median(times[variant][name] for times in taken)
        row["after_imports_s"] = row["first_step_s"] - row["imports_s"]
        first = rows[0] if rows else row
        row["of_first"] = row["first_step_s"] / first["first_step_s"]
        row["of_first_after_imports"] = row["after_imports_s"] / first["after_imports_s"]
        rows.append(row)
    return rows


def tables(rows: Sequence[dict[str, Any]]) -> str:
    return format_table(
        rows,
        {
            "case": lambda r: r["case"],
            "start": lambda r: r["variant"],
            "to first step s": lambda r: f"{r['first_step_s']:.2f}",
            "of first": lambda r: f"{r['of_first']:.2f}",
            "imports s": lambda r: f"{r['imports_s']:.2f}",
            "after imports s": lambda r: f"{r['after_imports_s']:.2f}",
            "of first after imports": lambda r: f"{r['of_first_after_imports']:.2f}",
            "n": lambda r: r["samples"],
            "target": lambda r: (
                target_verdict(r["of_first"], MOST_OF_FIRST, at_most=True)
                if r["variant"] == "second"
                else ""
            ),
        },
    )

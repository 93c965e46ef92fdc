"""The stages of suite first-day, as data: each one's command, time limit and result."""

import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.kernel_choice import TUNED

LEAST_MINUTES = 1.0  # a stage is not started with less, because starting alone takes as long


class Stage(NamedTuple):
    """A part of the first day. In its arguments {python}, {dir} and {minutes} are replaced."""

    name: str
    minutes: float  # the most that it may take, in all slices together
    command: str
    tiny: str | None  # further arguments that make it a trial on a CPU; None: it has no trial
    result: str  # the file in DIR that it writes: rows of JSON, or one JSON value
    needs_gpu: bool = True
    collect: Path | None = None  # folder from which new JSON files are copied to DIR/tuned

    @property
    def least_minutes(self) -> float:
        return min(LEAST_MINUTES, self.minutes / 2)


_BENCHMARKS = "{python} -m jaxtrain.benchmarks."
_KERNELS = "{python} -m pallas_kernels.bench --minutes={minutes} --resume --out={dir}/"
STAGES = (
    Stage("machine", 3, _BENCHMARKS + "card --out={dir}/machine.json", "--tiny", "machine.json"),
    Stage(
        "tests",
        10,
        _BENCHMARKS + "gpu_tests --minutes={minutes} --out={dir}/tests.jsonl",
        "--tiny",
        "tests.jsonl",
    ),
    Stage("kernels", 15, _KERNELS + "kernels.json", "--tiny", "kernels.json"),
    Stage(
        "tune", 20, _KERNELS + "tuned.json --tune --save", None, "tuned.json", True, collect=TUNED
    ),
    Stage(
        "training",
        30,
        "{python} -m jaxtrain.bench --suite=gpu --optimizers=muon --minutes={minutes} --resume "
        "--json={dir}/training.jsonl --trace={dir}/traces",
        "--tiny --sizes=gpt_124m --variants=jaxtrain --optimizers=adamw",
        "training.jsonl",
    ),
    Stage(
        "plan",
        10,
        # It compiles for the card but must not take it, so JAX has to see the variable first.
        f"env JAX_PLATFORMS=cpu {_BENCHMARKS}plan_check {{dir}} --minutes={{minutes}}",
        "--tiny",
        "plan.json",
        needs_gpu=False,
    ),
    Stage(
        "profile",
        3,
        "{python} -m jaxtrain.profile {dir}/traces --json={dir}/profile.jsonl",
        "",
        "profile.jsonl",
        needs_gpu=False,
    ),
)


def build_argv(stage: Stage, folder: Path, minutes: float, tiny: bool) -> list[str]:
    """Returns a stage's command."""
    words = shlex.split(f"{stage.command} {stage.tiny or ''}" if tiny else stage.command)
    values = {"python": sys.executable, "dir": folder, "minutes": f"{minutes:.2f}"}
    return [word.format(**values) for word in words]

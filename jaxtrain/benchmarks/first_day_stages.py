"""The stages of suite first-day, as data: each one's command, time limit and result."""

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtrain.benchmarks.first_day_results import FirstDayError
from pallas_kernels.kernel_choice import TUNED

LEAST_MINUTES = 1.0  # a stage is not started with less, because starting alone takes as long


class Stage(NamedTuple):
    """A part of the first day.

    In its command {python}, {dir} and {minutes} are replaced, and {save} by --save, or by nothing
    in a trial.
    """

    name: str
    minutes: float  # the most that it may take, in all slices together
    command: str
    tiny: str | None  # further arguments that make it a trial on a CPU; None: it has no trial
    result: str  # the file in DIR that it writes: rows of JSON, or one JSON value
    reads: str = ""  # what it reads in DIR, with which it needs no GPU
    collect: Path | None = None  # folder from which new JSON files are copied to DIR/tuned
    call_minutes: float = math.inf  # the most that it may take in this call

    @property
    def least_minutes(self) -> float:
        return min(LEAST_MINUTES, self.minutes / 2)

    @property
    def flag(self) -> str:
        """The stage as --stages takes it."""
        limit = "" if self.call_minutes == math.inf else f":{self.call_minutes:g}"
        return f"{self.name}{limit}"


_BENCHMARKS = "{python} -m jaxtrain.benchmarks."
TINY_KERNELS = "--tiny --only norm"  # interpreting all of them takes minutes
# Both stages of the kernels share one file, so that tuning repeats no contest at default tiles.
_KERNELS = "{python} -m pallas_kernels.bench --minutes={minutes} --resume {save} "
_KERNELS += "--out={dir}/kernels.json"
STAGES = (
    Stage("machine", 3, _BENCHMARKS + "card --out={dir}/machine.json", "--tiny", "machine.json"),
    Stage(
        "tests",
        10,
        _BENCHMARKS + "gpu_tests --minutes={minutes} --out={dir}/tests.jsonl",
        "--tiny",
        "tests.jsonl",
    ),
    Stage("kernels", 15, _KERNELS, TINY_KERNELS, "kernels.json", collect=TUNED),
    Stage("tune", 20, _KERNELS + " --tune", TINY_KERNELS, "kernels.json", collect=TUNED),
    Stage(
        "training",
        30,
        "{python} -m jaxtrain.bench --suite=gpu --optimizers=muon --minutes={minutes} --resume "
        "--seconds=8 --json={dir}/training.jsonl --trace={dir}/traces",
        "--tiny --sizes=gpt_124m --variants=jaxtrain --optimizers=adamw",
        "training.jsonl",
    ),
    Stage(
        "profile",
        3,
        "{python} -m jaxtrain.profile {dir}/traces --json={dir}/profile.jsonl",
        "",
        "profile.jsonl",
        reads="traces",
    ),
    Stage(
        "plan",
        10,
        # It compiles for the card but must not take it, so JAX has to see the variable first. It
        # also reads profile.jsonl.
        f"env JAX_PLATFORMS=cpu {_BENCHMARKS}plan_check {{dir}} --minutes={{minutes}}",
        "--tiny",
        "plan.json",
        reads="training.jsonl",
    ),
)


def choose_stages(words: Sequence[str], stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """Returns the stages that --stages names, in its order; all of them if it is empty.

    Raises:
        FirstDayError: a name is unknown or there twice, or a limit allows no start.
    """
    known, chosen = {stage.name: stage for stage in stages}, {}
    for word in words:
        name, colon, text = word.partition(":")
        if name not in known or name in chosen:
            raise FirstDayError(
                f"--stages must be of {', '.join(known)}, each at most once; got {name}."
            )
        stage = known[name]
        try:
            minutes = float(text) if colon else math.inf
        except ValueError:
            minutes = math.nan
        if not minutes >= stage.least_minutes:
            raise FirstDayError(
                f"--stages={name}:MINUTES must be at least {stage.least_minutes:g}; got {word}."
            )
        chosen[name] = stage._replace(call_minutes=minutes)
    return list(chosen.values() or stages)


def build_argv(stage: Stage, folder: Path, minutes: float, tiny: bool) -> list[str]:
    """Returns a stage's command."""
    words = shlex.split(f"{stage.command} {stage.tiny or ''}" if tiny else stage.command)
    values = {"python": sys.executable, "dir": folder, "minutes": f"{minutes:.2f}"}
    values["save"] = "" if tiny else "--save"
    return [text for word in words if (text := word.format(**values))]

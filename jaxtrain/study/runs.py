"""Trains the runs of a study, each in an ordinary run directory, and reads their results."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.config.mixture_fields import parse_sources
from jaxtrain.config.train_config import TrainConfig, flatten
from jaxtrain.data.sources import AnyCorpus, open_split, point_at_shards
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.metrics.jsonl import FILE, read_metrics
from jaxtrain.reporting.loss_curve import smooth
from jaxtrain.reporting.terminal import EVAL_LOSS, LOSS
from jaxtrain.run_directory.contents import (
    CONFIG,
    began_with,
    has_ended,
    load_train_config,
    read_summary_json,
)
from jaxtrain.run_directory.lock import RunLock
from jaxtrain.study.plan import Trial
from jaxtrain.train import train
from jaxtrain.training.loop import Diverged

DIVERGED = "diverged.json"  # written into the folder of a run that diverged
CLAIM = ".claim"  # lock file of the process that works on a run; it names its pid, host and start


class Interrupted(Exception):
    """A signal stopped a run after its save; `status` is the process's exit status."""

    def __init__(self, status: int):
        self.status = status
        super().__init__(f"stopped with status {status}")


Curve = list[tuple[float, float, float]]  # rows of (step, seconds in steps, nats/token)


class Result(NamedTuple):
    """What a run of a study measured."""

    trial: Trial
    loss: float  # held-out nats/token after the last step; inf if the run diverged
    seconds: float  # total of the steps, without compilation, evaluation and saves
    compile_s: float
    train: Curve
    held_out: Curve

    @property
    def diverged(self) -> bool:
        return self.loss == float("inf")


def open_data(base: TrainConfig, workdir: Path) -> tuple[TrainConfig, AnyCorpus]:
    """Returns the base config with shards as its data, and the corpus.

    Text is encoded once, below the study's folder, and not again by every run.
    """
    corpus = open_split(base.data, "train", base.model.V, workdir, base.steps)
    return dataclasses.replace(base, data=point_at_shards(base.data, corpus)), corpus


def is_finished(trial: Trial) -> bool:
    """Returns whether a run has ended: with an evaluation after its last step, or by diverging."""
    folder = Path(trial.config.workdir)
    if (folder / DIVERGED).exists():
        return True
    try:
        return has_ended(read_summary_json(folder), trial.config.steps)
    except (FileNotFoundError, ValueError):  # no summary, or a damaged one, which train() rewrites
        return False


def check_folder(trial: Trial) -> None:
    """Raises ValueError if the trial's folder contains a run of another config."""
    folder = Path(trial.config.workdir)
    if not (folder / CONFIG).exists():
        return
    stored, wanted = identity(load_train_config(folder)), identity(trial.config)
    same = lambda name, x, y: began_with(x, y) if name == "weights" else x == y
    changed = [
        f"{k}={stored[k]!r}, now {v!r}" for k, v in wanted.items() if not same(k, stored[k], v)
    ]
    if changed:
        raise ValueError(
            f"the study's folder must contain only runs of this study; got {'; '.join(changed)} in "
            f"{folder}. Set --study.workdir to a new folder, or remove that one."
        )


def identity(cfg: TrainConfig) -> dict[str, Any]:
    """Returns the fields that decide what is trained.

    Paths of data are compared by the folder's name only, which is a hash if the study encoded text.
    """
    values = {k: v for k, v in flatten(cfg).items() if k not in ("workdir", "compile_cache")}
    sources = {name: Path(path).name for name, path in parse_sources(cfg.data.mixture).items()}
    return values | {"data.shards": Path(cfg.data.shards).name, "data.mixture": str(sources)}


def run_trial(
    trial: Trial, devices: Sequence[Any] | None = None, train: Callable[..., int] = train
) -> Result:
    """Trains a run to its end, unless it has ended before, and returns its result.

    The run is claimed first, so that several processes, also on several hosts, can work on one
    folder. A claim ends with its process.

    Args:
        train: train(config, devices, quiet=True) trains a run in its folder, and returns 0 or the
            exit status of a signal.

    Raises:
        RunLocked: another process works on the run.
        Interrupted: a signal stopped the run, which is saved.
    """
    with RunLock(trial.config.workdir, "--study.workdir", wait_s=0.0, name=CLAIM):
        if is_finished(trial):  # another process may have ended it since this one looked
            return read_result(trial)
        try:
            status = train(trial.config, devices, quiet=True)
        except Diverged as error:
            path = Path(trial.config.workdir) / DIVERGED
            write_atomic(path, strict_json({"error": str(error)}) + "\n")
        else:
            if status:
                raise Interrupted(status)
        return read_result(trial)


def read_result(trial: Trial) -> Result:
    """Returns the result of a run that has ended.

    Raises:
        ValueError: the run has not been evaluated after its last step.
    """
    folder = Path(trial.config.workdir)
    tokens_before = trial.config.data.tokens_before
    records = read_metrics(folder / FILE)
    last_step, seconds = 0, 0.0  # at the newest record: steps trained, and seconds in them
    compile_s = sum(record.get("perf/compile_time_s", 0.0) for record in records)
    train_rows, held_out = [], []
    for record in records:
        if "perf/tokens_per_s" in record:
            tokens = tokens_before(record["step"]) - tokens_before(last_step)
            seconds += tokens / record["perf/tokens_per_s"]
            last_step = record["step"]
        row = (record["step"], seconds)
        if LOSS in record:
            train_rows.append((*row, record[LOSS]))
        if EVAL_LOSS in record:
            held_out.append((*row, record[EVAL_LOSS]))
    if (folder / DIVERGED).exists():
        return Result(trial, float("inf"), seconds, compile_s, train_rows, held_out)
    if not held_out or held_out[-1][0] != trial.config.steps:
        raise ValueError(f"a run must end with an evaluation; got none in {folder}. Remove it.")
    loss = held_out[-1][2]
    loss = loss if loss < float("inf") else float("inf")  # nan counts as diverged too
    return Result(trial, loss, seconds, compile_s, train_rows, held_out)


def falling_curve(result: Result) -> Curve:
    """Returns the curve that decides when a loss was reached.

    These are the held-out losses if there are several, else the smoothed training losses.
    """
    if len(result.held_out) > 1 or not result.train:
        return result.held_out
    steps, seconds, losses = np.array(result.train, float).T
    trend_steps, trend = smooth(steps, losses)
    trend_s = np.interp(trend_steps, steps, seconds)
    return list(zip(trend_steps, trend_s, trend, strict=True))

"""The runs of a study: each an ordinary run directory, trained once and read as often as asked."""

import itertools
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtrain.config.train_config import flatten, freeze, to_dict
from jaxtrain.data.corpus import open_corpus
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.metrics.jsonl import FILE, read_metrics
from jaxtrain.reporting.loss_curve import smooth
from jaxtrain.reporting.terminal import EVAL_LOSS, LOSS, format_duration
from jaxtrain.run_directory.contents import (
    CONFIG,
    has_ended,
    load_train_config,
    read_summary_json,
)
from jaxtrain.study.plan import Trial
from jaxtrain.train import train
from jaxtrain.training.loop import Diverged

DIVERGED = "diverged.json"


class Interrupted(Exception):
    """A signal stopped a run after its save; `status` is the process's exit status."""

    def __init__(self, status):
        self.status = status
        super().__init__(f"stopped with status {status}")


class Result(NamedTuple):
    """What a finished run left. Curves are (step, seconds in steps, nats/token) rows."""

    trial: Trial
    loss: float  # held out, after the last step; inf where the run diverged
    seconds: float  # in steps: without compilation, evaluation and saves
    compile_s: float
    train: list
    held_out: list

    @property
    def diverged(self) -> bool:
        return self.loss == float("inf")


def open_data(base, workdir):
    """(base config on shards, corpus): text is encoded once, below the study's folder."""
    corpus = open_corpus(base.data, "train", base.model.V, workdir)
    if base.data.shards:
        return base, corpus
    values = to_dict(base)
    values["data"] |= {"text": "", "shards": str(Path(corpus.shards[0].path).parent)}
    return freeze(values), corpus


def is_finished(trial: Trial) -> bool:
    """Whether the run has ended: with an evaluation after its last step, or by diverging."""
    folder = Path(trial.config.workdir)
    if (folder / DIVERGED).exists():
        return True
    try:
        return has_ended(read_summary_json(folder), trial.config.steps)
    except (FileNotFoundError, ValueError):  # damaged: train() writes it again
        return False


def check_folder(trial: Trial) -> None:
    """Raises ValueError where the run's folder holds a run of another config."""
    folder = Path(trial.config.workdir)
    if not (folder / CONFIG).exists():
        return
    stored, asked = (_identity(cfg) for cfg in (load_train_config(folder), trial.config))
    changed = [f"{k}={stored[k]!r}, now {v!r}" for k, v in asked.items() if stored[k] != v]
    if changed:
        raise ValueError(
            f"the study's folder must hold runs of this study alone; got {'; '.join(changed)} in "
            f"{folder}. Set --study.workdir to a new folder, or remove that one."
        )


def _identity(cfg) -> dict:
    """What is trained, by flag; shards by their folder's name, which is a hash of their text."""
    values = {k: v for k, v in flatten(cfg).items() if k not in ("workdir", "compile_cache")}
    return values | {"data.shards": Path(cfg.data.shards).name}


def run_trial(trial: Trial, devices=None) -> Result:
    """Trains a run to its end, or reads it where it has ended before.

    Raises:
        Interrupted: a signal asked it to stop; it is saved.
    """
    if not is_finished(trial):
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
    """The Result of a run that has ended.

    Raises:
        ValueError: the run has not been evaluated after its last step.
    """
    folder = Path(trial.config.workdir)
    tokens = trial.config.data.batch * trial.config.data.seq_len
    records = read_metrics(folder / FILE)
    steps, seconds = [0], [0.0]  # steps trained and seconds in them, at each logged step
    compile_s = sum(record.get("perf/compile_time_s", 0.0) for record in records)
    train_rows, held_out = [], []
    for record in records:
        if "perf/tokens_per_s" in record:
            took_s = (record["step"] - steps[-1]) * tokens / record["perf/tokens_per_s"]
            steps.append(record["step"])
            seconds.append(seconds[-1] + took_s)
        row = (record["step"], seconds[-1])
        if LOSS in record:
            train_rows.append((*row, record[LOSS]))
        if EVAL_LOSS in record:
            held_out.append((*row, record[EVAL_LOSS]))
    if (folder / DIVERGED).exists():
        return Result(trial, float("inf"), seconds[-1], compile_s, train_rows, held_out)
    if not held_out or held_out[-1][0] != trial.config.steps:
        raise ValueError(f"a run must end with an evaluation; got none in {folder}. Remove it.")
    loss = held_out[-1][2] if held_out[-1][2] < float("inf") else float("inf")  # nan too
    return Result(trial, loss, seconds[-1], compile_s, train_rows, held_out)


def falling_curve(result: Result) -> list:
    """(step, seconds, loss) rows to see when a loss is reached: held out, or else smoothed.

    Held-out points where there are several; else the trend of the training loss.
    """
    if len(result.held_out) > 1 or not result.train:
        return result.held_out
    steps, seconds, losses = np.array(result.train, float).T
    at, trend = smooth(steps, losses)
    return list(zip(at, np.interp(at, steps, seconds), trend, strict=True))


class Progress:
    """Runs trials one after the other and prints a line for each that it had to train."""

    def __init__(self, runs: int, devices=None, show=print):
        self._runs, self._devices, self._show = runs, devices, show
        self._count, self._trained = itertools.count(1), []
        self.read = 0

    def run(self, trial: Trial) -> Result:
        number = next(self._count)
        known, start_s = is_finished(trial), time.monotonic()
        result = run_trial(trial, self._devices)
        if known:
            self.read += 1
            return result
        self._trained.append(time.monotonic() - start_s)
        eta_s = (self._runs - number) * sum(self._trained) / len(self._trained)
        outcome = "diverged" if result.diverged else f"{result.loss:.4f} nats/token"
        self._show(
            f"run {number:>{len(str(self._runs))}} of {self._runs}  {trial.condition}  "
            f"{trial.contender}  {trial.setting}  seed {trial.seed}  {outcome}  "
            f"{self._trained[-1]:.1f} s  eta {format_duration(eta_s)}"
        )
        return result

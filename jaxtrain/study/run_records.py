"""Stores the results of a study's runs in one file, from which the study can continue elsewhere.

A run is found again by its config, not by its place: a record is used wherever a run with the same
fields would be trained, but for the folders of the run, its data and its compile cache.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.config.train_config import TrainConfig
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.study.plan import Trial
from jaxtrain.study.runs import Result, identity

FILE = "runs.jsonl"  # in the study's folder: a line for each run that has ended
DEFAULTS = identity(TrainConfig())


def record_of(result: Result) -> dict[str, Any]:
    """Returns a run's result and the fields of its config that are not the default, for JSON."""
    config = identity(result.trial.config)
    return {
        "config": {name: value for name, value in config.items() if value != DEFAULTS[name]},
        "loss_nats": None if result.diverged else result.loss,
        "seconds": result.seconds,
        "compile_s": result.compile_s,
        "train": [list(map(float, row)) for row in result.train],
        "held_out": [list(map(float, row)) for row in result.held_out],
    }


class RunRecords:
    """The records of a file, by config.

    Raises:
        ValueError: the file is not one of records; the error names the line.
    """

    def __init__(self, path: str | Path = ""):
        self.path, self._records = path, {}
        if not path:
            return
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ValueError(
                f"study.earlier must be a {FILE} of this study; got {path}: {reason}."
            ) from None
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._records[_key(DEFAULTS | record["config"])] = record
                _read(record, None)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"study.earlier must be a {FILE} of this study; line {number} of {path} is "
                    f"not a record: {error!r}."
                ) from None

    def __len__(self) -> int:
        return len(self._records)

    def find(self, trial: Trial) -> Result | None:
        """Returns the result of a run with this trial's config, if there is a record of one."""
        record = self._records.get(_key(identity(trial.config))) if self._records else None
        return _read(record, trial) if record else None


def write_records(path: Path, results: Iterable[Result]) -> None:
    """Writes a line for each result, in a fixed order."""
    lines = sorted(strict_json(record_of(result)) for result in results)
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)  # tuples become lists, as in a record


def _read(record: Mapping[str, Any], trial: Any) -> Result:
    read_curve = lambda name: [(float(a), float(b), float(c)) for a, b, c in record[name]]
    loss = float("inf") if record["loss_nats"] is None else float(record["loss_nats"])
    seconds, compile_s = float(record["seconds"]), float(record["compile_s"])
    return Result(trial, loss, seconds, compile_s, read_curve("train"), read_curve("held_out"))

"""Reads the files that describe a run: config.json and summary.json in its run directory."""

import json
import re
from pathlib import Path
from typing import Any

from absl import logging

from jaxtrain.config import train_config as config_lib

CONFIG, SUMMARY = "config.json", "summary.json"
EVAL_LOSS = "eval/loss_nats"  # in summary.json once the last step has been evaluated


def read_config_json(workdir: Path | str) -> dict[str, Any]:
    """Returns a run's config.json: its config, versions, routes, data and more.

    Raises:
        ValueError: the file is missing or damaged, or does not belong to a run.
    """
    if not str(workdir).strip():
        raise ValueError(f"--run must name a folder; got {str(workdir)!r}.")
    path = Path(workdir) / CONFIG
    try:
        stored = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"--run must be a run's folder with a config.json; got {workdir}."
        ) from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(
            f"{path} must contain a run's config as JSON; got {error}. Run the training command "
            "again to rewrite it."
        ) from error
    sections = [stored.get(key) for key in ("config", "data")] if isinstance(stored, dict) else []
    if not sections or not all(isinstance(section, dict) for section in sections):
        raise ValueError(
            f"{path} must contain a run's config and data; got something else. Run the training "
            "command again to rewrite it."
        )
    return stored


def load_train_config(
    workdir: Path | str, overrides: dict[str, Any] | None = None
) -> config_lib.TrainConfig:
    """Returns the TrainConfig that a run was trained with.

    Args:
        overrides: values to replace, by flag name, such as {"mesh.fsdp": 1}.

    Raises:
        ValueError: as read_config_json; or a field is unknown, or its value is no longer allowed.
    """
    values = read_config_json(workdir)["config"] | {"workdir": str(workdir)}
    try:
        for name, value in (overrides or {}).items():
            section, _, field = name.rpartition(".")
            values |= (
                {section: values.get(section, {}) | {field: value}} if section else {name: value}
            )
        return config_lib.freeze(values)
    except (AttributeError, TypeError, ValueError) as error:  # a section may be of any type
        reason = re.sub(r" Set --\S+\.$", "", str(error))  # no flag changes a stored config
        path = Path(workdir) / CONFIG
        raise ValueError(f"{path} must be edited, because no flag changes it: {reason}") from None


def began_with(stored: str, weights: str) -> bool:
    """Returns whether `stored`, the weights in a run's config.json, are those of --weights.

    For weights of a run, config.json also names the step: `RUN_DIR/checkpoints/STEP`.
    """
    return stored == weights or bool(
        weights and Path(stored).parents[1:2] == (Path(weights),) and Path(stored).name.isdecimal()
    )


def read_summary_json(workdir: Path | str) -> dict[str, Any]:
    """Returns a run's summary.json.

    Raises:
        FileNotFoundError: the run has not written one yet.
        ValueError: the file is damaged.
    """
    summary = json.loads((Path(workdir) / SUMMARY).read_bytes())
    if not (isinstance(summary, dict) and {"step", "stopped_by"} <= summary.keys()):
        raise ValueError("a field is missing")
    return summary


def has_ended(summary: dict[str, Any], steps: int) -> bool:
    """Returns whether a run, by its summary, has evaluated its last step, `steps`."""
    return summary["stopped_by"] is None and EVAL_LOSS in summary and summary["step"] == steps


def is_finished(workdir: Path | str, steps: int, step: int) -> bool:
    """Returns whether a run whose newest checkpoint is `step` has nothing left to do.

    A damaged summary.json or config.json counts as missing: the run writes both again.
    """
    if step != steps:
        return False
    try:
        if not has_ended(read_summary_json(workdir), steps):
            return False
        read_config_json(workdir)
    except FileNotFoundError:
        return False
    except ValueError as error:
        logging.warning("%s will be rewritten: %s", Path(workdir) / SUMMARY, error)
        return False
    return True

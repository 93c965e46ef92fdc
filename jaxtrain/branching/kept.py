"""Finds a checkpoint that a run has kept."""

from pathlib import Path
from typing import Any

from jaxtrain.checkpoint import integrity
from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.run_directory.contents import read_config_json

CHECKPOINTS = "checkpoints"


def read_kept_record(parent: Path, step: int, flag: str) -> dict[str, Any]:
    """Returns the record of a run's checkpoint.

    Args:
        flag: names the step in errors, such as "--at".

    Raises:
        ValueError: there is no run, or it has not kept the checkpoint; the error lists those that
            it has.
        CheckpointError: the record is damaged.
    """
    read_config_json(parent)
    with Checkpoints(parent / CHECKPOINTS, 1, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    if step not in steps:
        kept = ", ".join(map(str, steps)) or "none"
        raise ValueError(
            f"{flag} must be a checkpoint that {parent} has kept: {kept}; got {step}. To keep "
            "more, train with --keep_every."
        )
    record = integrity.read_record(parent / CHECKPOINTS / str(step))
    integrity.check_format(record)
    return record

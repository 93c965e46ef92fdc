"""Where a run came from: the checkpoint of another run that it branched from, in its config.json.

config.json["lineage"] of a branch has these fields; a run that started by itself has none.

    kind           "branch", or "merge" for an average of checkpoints (jaxtrain.branching.merge)
    parent         absolute path of the other run's folder
    step           step of its checkpoint
    checkpoint     sha256 of that checkpoint's record, which contains a digest of every array
    new_optimizer  whether the branch began at step 0, with a new optimizer state
    decay_steps    steps over which the rate decays, if that was asked for; else 0
    data           the loader's state in the checkpoint
    new_data       whether the branch was given other data, or another batch size
    changes        a line for each changed field of the config
"""

from pathlib import Path
from typing import Any

from jaxtrain.run_directory.contents import read_config_json

KEY = "lineage"


def read_lineage(workdir: Path | str) -> dict[str, Any] | None:
    """Returns the lineage in a run's config.json; None if it has none, or cannot be read."""
    try:
        return read_config_json(workdir).get(KEY)
    except (OSError, ValueError):  # the run writes the file again
        return None


def read_branch(workdir: Path | str) -> dict[str, Any] | None:
    """Returns the lineage of a branch; None for every other run."""
    lineage = read_lineage(workdir)
    return lineage if lineage and lineage["kind"] == "branch" else None

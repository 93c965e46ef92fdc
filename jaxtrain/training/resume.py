"""Restores the newest checkpoint of a run, or starts it at step 0."""

import jaxtrain.config.train_config as config_lib
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.errors import CheckpointError
from jaxtrain.model.compatibility import check_same_model
from jaxtrain.training.step import abstract_state


def start_state(run, checkpoints, batches, first_state):
    """Restores the newest checkpoint, or calls first_state(run) where there is none.

    Returns:
        (TrainState, the Restored that it is from or None); `batches` is moved to the same step.

    Raises:
        ValueError: the checkpoint is of other data or another model, or past the last step.
    """
    stored = broadcast_from_process_0(lambda: newest_config(checkpoints))
    check_resumed(run.cfg.model, stored)
    try:
        restored = checkpoints.restore(abstract_state(run.model, run.optimizer, run.mesh))
    except ValueError as error:
        changed = config_lib.describe_changes(stored, run.cfg) if stored else []
        changed = "; ".join(change for change in changed if change.startswith("optim."))
        raise ValueError(f"{error}{changed and f' Changed: {changed}.'}") from error
    if restored is None:
        return first_state(run), None
    batches.restore(restored.meta["data"])
    if restored.step > run.cfg.steps:
        raise ValueError(
            f"steps must be at least the checkpoint's step {restored.step}; got "
            f"steps={run.cfg.steps}. Set --steps or another --workdir."
        )
    return restored.state, restored._replace(state=None)  # the loop donates it


def newest_config(checkpoints) -> dict:
    """Returns the config of the newest checkpoint, by the names of flags; {} if there is none."""
    try:
        meta = checkpoints.read_meta()
    except CheckpointError:  # restore() says more of it
        return {}
    return meta["config"] if meta else {}


def check_resumed(cfg, stored: dict) -> None:
    """Raises ValueError where a ModelConfig is not that of the checkpoint to be resumed.

    Args:
        stored: config of the checkpoint, by the names of flags; what it lacks is not compared.
    """
    theirs = {field: stored[f"model.{field}"] for field in vars(cfg) if f"model.{field}" in stored}
    check_same_model(cfg, theirs, "the one that the run began with", "a new --workdir")

"""Restores the newest checkpoint of a run, or starts it at step 0."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jaxtrain.config.train_config as config_lib
from jaxtrain.checkpoint.manager import Checkpoints, Restored
from jaxtrain.data.loader import Batches
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.errors import CheckpointError
from jaxtrain.model.compatibility import check_same_model
from jaxtrain.run_directory.contents import began_with
from jaxtrain.sites.outer_state import add_template, restore_outer_state
from jaxtrain.sites.rounds import Rounds
from jaxtrain.training.run import Run
from jaxtrain.training.step import TrainState, abstract_state


def start_state(
    run: Run,
    checkpoints: Checkpoints,
    batches: Batches,
    initial_state: Callable[[Run], tuple[TrainState, str]],
    rounds: Rounds | None = None,
) -> tuple[Run, TrainState, Restored | None]:
    """Restores the newest checkpoint, or calls initial_state(run) if there is none.

    Args:
        rounds: the exchange with other sites, whose state is restored too; None on one site.

    Returns:
        the run, whose cfg.weights now name what it began with, also the step of another run; the
        state; and the checkpoint that it came from, if any. `batches` continues at its step.

    Raises:
        ValueError: the checkpoint has other data or another model, or is past the last step.
    """
    stored = broadcast_from_process_0(lambda: newest_config(checkpoints))
    check_resumed(run.cfg.model, stored)
    try:
        template = abstract_state(run.model, run.optimizer, run.mesh)
        restored = checkpoints.restore(add_template(rounds, template) if rounds else template)
    except ValueError as error:
        changes = config_lib.describe_changes(stored, run.cfg) if stored else []
        changes = "; ".join(change for change in changes if change.startswith(("optim.", "sites.")))
        if not changes:
            raise
        raise ValueError(
            f"{error} Changed: {changes}. To start with these values from this run's weights, set "
            f"--weights={run.cfg.workdir} and a new --workdir."
        ) from error
    if restored is None:
        state, weights = initial_state(run)
        if rounds:
            rounds.begin(state)
        return _with_weights(run, weights), state, None
    stored_weights = restored.meta["config"].get("weights", "")
    if began_with(stored_weights, run.cfg.weights):
        run = _with_weights(run, stored_weights)
    batches.restore(restored.meta["data"])
    if restored.step > run.cfg.steps:
        raise ValueError(
            f"steps must be at least the checkpoint's step {restored.step}; got "
            f"steps={run.cfg.steps}. Set --steps or another --workdir."
        )
    state = restored.state
    if rounds:
        state = restore_outer_state(rounds, state, restored.meta["sites"], TrainState)
    # Restored has no state here, so that the loop's first step can donate the only reference.
    return run, state, restored._replace(state=None)


def _with_weights(run: Run, weights: str) -> Run:
    return run._replace(cfg=dataclasses.replace(run.cfg, weights=weights))


def newest_config(checkpoints: Checkpoints) -> dict[str, Any]:
    """Returns the config of the newest checkpoint, by flag name; {} if there is none."""
    try:
        meta = checkpoints.read_meta()
    except CheckpointError:  # restore() raises it with every step's reason
        return {}
    return meta["config"] if meta else {}


def check_resumed(cfg: config_lib.ModelConfig, stored: dict[str, Any]) -> None:
    """Raises ValueError if a model differs from that of the checkpoint to resume.

    Args:
        stored: the checkpoint's config, by flag name; {} if there is none. A field that it lacks
            did not exist yet, so that the model was that of its default.
    """
    if not stored:
        return
    default = lambda field: getattr(config_lib.ModelConfig, field)
    theirs = {field: stored.get(f"model.{field}", default(field)) for field in vars(cfg)}
    check_same_model(cfg, theirs, "the one that the run began with", "a new --workdir")

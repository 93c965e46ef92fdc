"""Restores the newest checkpoint of a run, or starts it at step 0; places a branch in its data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jaxtrain.config.train_config as config_lib
from jaxtrain.checkpoint.manager import Checkpoints, Restored
from jaxtrain.data.batch_state import stored_places
from jaxtrain.data.loader import Batches
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.errors import CheckpointError
from jaxtrain.model.compatibility import check_same_model
from jaxtrain.run_directory.contents import began_with
from jaxtrain.run_directory.lineage import read_branch
from jaxtrain.sites.outer_state import add_template, check_same_rounds, restore_outer_state
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
        ValueError: the checkpoint has other data, rounds or another model, or is past the last
            step; or a branch has lost the checkpoint that it began with.
    """
    branch = broadcast_from_process_0(lambda: read_branch(run.cfg.workdir))
    stored = broadcast_from_process_0(lambda: newest_config(checkpoints))
    check_resumed(run.cfg.model, stored)
    if stored and (rounds or not branch):  # a branch begins with a checkpoint of another run
        check_same_rounds(run.cfg.sites, stored)
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
        if branch:
            place_in_data(batches, branch)
            check_begins_anew(branch, run.cfg.workdir)
        state, weights = initial_state(run)
        if rounds:
            rounds.begin(state)
        return _with_weights(run, weights), state, None
    stored_weights = restored.meta["config"].get("weights", "")
    if began_with(stored_weights, run.cfg.weights):
        run = _with_weights(run, stored_weights)
    if branch and not branch["new_optimizer"] and restored.step == branch["step"]:
        place_in_data(batches, branch)
    else:
        batches.restore(restored.meta["data"])
    batches.check_step(restored.step)
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


def place_in_data(batches: Batches, branch: dict[str, Any]) -> None:
    """Sets the batch that a branch begins with: the trunk's next one, or the first of other data.

    With other batch sizes, it is the first batch that contains no sequence that the trunk read.

    Args:
        branch: from read_branch.

    Raises:
        ValueError: the data differ from the trunk's, although no flag changed them.
    """
    read, first = branch["data"], 0 if branch["new_optimizer"] else branch["step"]
    other = batches.describe_other_data(read)
    if other and not branch["new_data"] or first and not other and batches.has_sizes_of(read):
        batches.restore(read)  # raises an error if the data are other ones
        return
    batches.begin_at(first, 0 if other else stored_places(read["batch"], read["step"]))


def check_begins_anew(branch: dict[str, Any], workdir: str) -> None:
    """Raises ValueError if a branch without a checkpoint should have one."""
    if not branch["new_optimizer"]:
        raise ValueError(
            f"a branch must have the checkpoint that it began with, step {branch['step']} of "
            f"{branch['parent']}; {workdir} has none. Create the branch again with another --to."
        )


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

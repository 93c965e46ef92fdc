"""Starts a run from the weights of another run, whose optimizer may be a different one."""

from pathlib import Path
from typing import Any

import jax
from absl import logging

from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config.sections import OptimConfig
from jaxtrain.config.train_config import ModelConfig, freeze
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.errors import CheckpointError
from jaxtrain.interop import InteropError
from jaxtrain.model.compatibility import check_same_model
from jaxtrain.model.trees import ArrayTree
from jaxtrain.optim.acceleration import describe_evaluated_weights, eval_params
from jaxtrain.optim.build import build_optimizer
from jaxtrain.run_directory.contents import read_config_json
from jaxtrain.training.run import Run
from jaxtrain.training.step import abstract_state

CHECKPOINTS = "checkpoints"


def find_run(source: Path | str) -> tuple[Path, int | None] | None:
    """Returns (folder of a run, step or None for the newest); None if source is no run.

    Every process of a run calls it, since only process 0 may have the folder.

    Args:
        source: a run's folder, or `FOLDER/checkpoints/STEP`, one of its checkpoints.
    """
    path = Path(source)
    if path.name.isdecimal() and path.parent.name == CHECKPOINTS:
        return path.parent.parent, int(path.name)

    def is_run():
        try:
            read_config_json(path)
        except (OSError, ValueError):  # a Hugging Face folder has another config.json
            return (path / CHECKPOINTS).is_dir() and not (path / "config.json").exists()
        return True

    return (path, None) if broadcast_from_process_0(is_run) else None


def is_imported(weights: str) -> bool:
    """Returns whether cfg.weights are of another program, or of a run that began with such.

    Those of a run that can no longer be read count as imported.
    """
    seen = set()
    while weights and weights not in seen:
        seen.add(weights)
        found = find_run(weights)
        if found is None:
            return True
        try:  # of any step: the one that was used may have been deleted since
            weights = _read_config(found[0], None).get("weights", "")
        except (InteropError, CheckpointError):
            return True
    return bool(weights)


def check_run_model(cfg: ModelConfig, source: str) -> None:
    """Raises InteropError unless a run has a checkpoint of this model. Every process calls it."""
    stored = _read_config(*_locate(source))
    theirs = {name.removeprefix("model."): x for name, x in stored.items() if name[:6] == "model."}
    owner = f"that of the weights in {source}"
    check_same_model(cfg, theirs, owner, "another --weights", InteropError)


def load_run_weights(run: Run, shardings: Any) -> tuple[ArrayTree, str]:
    """Returns the weights with which the run in cfg.weights is evaluated, and their checkpoint.

    Args:
        run: the run to start, accepted by check_run_model.
        shardings: of its parameters, like them.

    Raises:
        InteropError: the checkpoint does not fit this run.
        CheckpointError: every checkpoint is damaged.
    """
    source = run.cfg.weights
    folder, step = _locate(source)
    stored = _read_config(folder, step)
    prefix = OptimConfig.PREFIX
    optim = {name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(prefix)}
    try:
        optimizer = build_optimizer(freeze(optim, OptimConfig), run.model.axes, run.mesh)
        template = abstract_state(run.model, optimizer, run.mesh)
        storage = run.cfg.checkpoint.storage
        with Checkpoints(folder / CHECKPOINTS, 1, read_only=True, storage=storage) as checkpoints:
            restored = checkpoints.restore(template, step=step)
    except ValueError as error:
        raise InteropError(f"the weights in {source} cannot be read: {error}") from error
    assert restored is not None  # check_run_model found one
    opt_state = restored.state.opt_state
    if jax.process_index() == 0:
        logging.info(
            "weights: step %d of %s, which %s trained; %s",
            *(restored.step, folder.resolve(), stored["optim.name"]),
            describe_evaluated_weights(opt_state),
        )
    evaluate = lambda state: eval_params(state.opt_state, state.params)
    checkpoint = str(folder / CHECKPOINTS / str(restored.step))
    return jax.jit(evaluate, out_shardings=shardings)(restored.state), checkpoint


def _locate(source: str) -> tuple[Path, int | None]:
    found = find_run(source)
    assert found is not None, source
    return found


def _read_config(folder: Path, step: int | None) -> dict[str, Any]:
    """Returns the config, by flag name, that a checkpoint was saved with.

    Raises:
        InteropError: there is no such checkpoint.
    """
    checkpoints = Checkpoints(folder / CHECKPOINTS, 1, read_only=True)

    def read():
        steps = checkpoints.steps()
        if not steps:
            raise InteropError(
                f"--weights must name a run with a checkpoint; got {folder}, which has none yet. "
                "Wait for its first save, see --save_every, or set another --weights."
            )
        if step is not None and step not in steps:
            raise InteropError(
                f"--weights must name one of the checkpoints {steps} of {folder}; got step={step}. "
                "Set --weights."
            )
        meta = checkpoints.read_meta(step)
        assert meta is not None  # a step deleted meanwhile is a CheckpointError
        return meta["config"]

    with checkpoints:
        return broadcast_from_process_0(read)

"""Creates a run's state at step 0: random weights, or those of a file or of another run."""

from pathlib import Path
from typing import Any

import jax

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.distributed.mesh import param_sharding
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config, read_weights
from jaxtrain.interop.run_weights import check_run_model, find_run, load_run_weights
from jaxtrain.model.compatibility import check_same_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.training.run import Run
from jaxtrain.training.step import TrainState, init_state


def check_model(cfg: ModelConfig, source: Path | str) -> None:
    """Raises InteropError if the weights in `source` are of another model, or not readable."""
    try:
        theirs = vars(read_config(source))
    except InteropError as error:
        raise InteropError(
            f"--weights={source} must be a run or readable weights of another program: {error}"
        ) from error
    owner = f"that of the weights in {source}"
    check_same_model(cfg, theirs, owner, "--weights", InteropError)


def check_weights(cfg: ModelConfig, source: str) -> None:
    """Raises InteropError if weights are of another model, or no weights. Every process calls it.

    Args:
        source: a run, or a file or folder of another program.
    """
    if find_run(source):
        check_run_model(cfg, source)
    else:
        check_model(cfg, source)


def load_params(
    source: Path | str, cfg: ModelConfig, axes: Any, shapes: Any, shardings: Any
) -> Any:
    """Loads the parameters of a Hugging Face folder or llm.c file as a tree of arrays.

    Each is moved to its devices before the next is read, so that the host stores one at a time.

    Args:
        cfg: accepted by check_model.
        axes, shapes, shardings: trees of Axes, ShapeDtypeStructs and Shardings.

    Raises:
        InteropError: the weights are damaged.
    """
    readers = read_weights(source, cfg, named_leaves(axes), named_leaves(shapes))
    arrays = [jax.device_put(readers[name](), s) for name, s in named_leaves(shardings).items()]
    return jax.tree.unflatten(jax.tree.structure(shardings), arrays)


def initial_state(run: Run) -> tuple[TrainState, str]:
    """Returns the state at step 0, random or with the parameters of cfg.weights, and their source.

    The optimizer's state is new in either case. The source is cfg.weights, or of a run the
    checkpoint that was read, `FOLDER/checkpoints/STEP`.

    Raises:
        InteropError: the weights are damaged, or of another model.
        CheckpointError: they are those of a run, all of whose checkpoints are damaged.
    """
    source, model = run.cfg.weights, run.model
    if not source:
        return init_state(model, run.optimizer, run.mesh, run.cfg.seed), source
    sharding_of = lambda axes, x: param_sharding(axes, x.shape, run.mesh)
    shardings = jax.tree.map(sharding_of, model.axes, model.shapes)
    check_weights(run.cfg.model, source)  # before memory is allocated
    if find_run(source):
        params, source = load_run_weights(run, shardings)
    else:
        params = load_params(source, run.cfg.model, model.axes, model.shapes, shardings)
    return init_state(model, run.optimizer, run.mesh, params), source

"""Whether weights fit the model that is asked for, and a run's first ones from elsewhere."""

import jax

from jaxtrain.distributed.mesh import param_sharding
from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config, read_weights
from jaxtrain.model.compatibility import check_same_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.training.step import init_state


def check_model(cfg, source) -> None:
    """Raises InteropError where a ModelConfig is not that of the weights in `source`."""
    whose = f"that of the weights in {source}"
    check_same_model(cfg, vars(read_config(source)), whose, "--weights", InteropError)


def load_params(source, cfg, axes, shapes, shardings):
    """Parameters of a Hugging Face folder, each placed as soon as it is read.

    Args:
        cfg: ModelConfig that check_model has passed.
        axes, shapes, shardings: trees of Axes, ShapeDtypeStructs and Shardings.

    Raises:
        InteropError: the weights are damaged.
    """
    readers = read_weights(source, cfg, named_leaves(axes), named_leaves(shapes))
    placed = [jax.device_put(readers[name](), at) for name, at in named_leaves(shardings).items()]
    return jax.tree.unflatten(jax.tree.structure(shardings), placed)


def initial_state(run):
    """Step 0: parameters drawn, or those of cfg.weights.

    Raises:
        InteropError: the weights are damaged, or of another model.
    """
    source, model = run.cfg.weights, run.model
    if source:
        check_model(run.cfg.model, source)  # before memory is taken
    state = init_state(model, run.optimizer, run.mesh, run.cfg.seed)
    if not source:
        return state
    place = lambda axes, x: param_sharding(axes, x.shape, run.mesh)
    at = jax.tree.map(place, model.axes, model.shapes)
    return state._replace(params=load_params(source, run.cfg.model, model.axes, model.shapes, at))

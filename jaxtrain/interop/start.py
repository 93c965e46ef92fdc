"""A run's first parameters from weights made elsewhere."""

import math

import jax

from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import read_config, read_weights
from jaxtrain.trees import named_leaves

# ModelConfig's fields that decide what weights mean; the rest decides how they are computed.
MEANING = "L D H G K F V norm norm_eps position mlp qk_norm tied bias logit_softcap".split()


def _same(ours, theirs) -> bool:
    """Files made from float32 say 9.999999747378752e-06 where 1e-5 is meant."""
    return ours == theirs or (type(ours) is float and math.isclose(ours, theirs, rel_tol=1e-6))


def check_model(cfg, source) -> None:
    """Raises InteropError where a ModelConfig is not that of the weights in `source`."""
    theirs = read_config(source)
    used = {"rope": "rope_theta", "learned": "positions"}
    wrong = [
        f"model.{field}={getattr(cfg, field)!r}, there {getattr(theirs, field)!r}"
        for field in (*MEANING, used[theirs.position])
        if not _same(getattr(cfg, field), getattr(theirs, field))
    ]
    if wrong:
        flags = " ".join(f"--config.{fault.split('=')[0]}" for fault in wrong)
        raise InteropError(
            f"the model must be that of the weights in {source}; got {'; '.join(wrong)}. "
            f"Set {flags}, or --config.weights."
        )


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

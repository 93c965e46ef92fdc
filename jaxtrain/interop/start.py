"""Whether weights fit the model that is asked for, and a run's first ones from elsewhere."""

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
    _compare(cfg, vars(read_config(source)), f"that of the weights in {source}", "--weights")


def check_resumed(cfg, stored: dict) -> None:
    """Raises InteropError where a ModelConfig is not that of the checkpoint to be resumed.

    Args:
        stored: config of the checkpoint, by the names of flags; what it lacks is not compared.
    """
    theirs = {field: stored[f"model.{field}"] for field in vars(cfg) if f"model.{field}" in stored}
    _compare(cfg, theirs, "the one that the run began with", "a new --workdir")


def _compare(cfg, theirs, whose, otherwise):
    used = {"rope": "rope_theta", "learned": "positions"}
    wrong = [
        f"model.{field}={getattr(cfg, field)!r}, there {theirs[field]!r}"
        for field in (*MEANING, used[cfg.position])
        if field in theirs and not _same(getattr(cfg, field), theirs[field])
    ]
    if wrong:
        flags = " ".join(f"--{fault.split('=')[0]}" for fault in wrong)
        raise InteropError(
            f"the model must be {whose}; got {'; '.join(wrong)}. Set {flags}, or {otherwise}."
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

"""Weight initialisation: each parameter's standard deviation, and how its values are drawn.

The first loss of a model is about ln V, the loss of a uniform guess.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.config.model_section import ModelConfig
from jaxtrain.model.trees import param_tree


def small_std(cfg: ModelConfig) -> float:
    """Returns the standard deviation of embeddings and matrices that read the residual stream.

    Source: Nguyen & Salazar 2019, https://arxiv.org/abs/1910.05895 ("SmallInit").
    """
    return (2 / (5 * cfg.D)) ** 0.5


def residual_std(cfg: ModelConfig) -> float:
    """Returns the standard deviation of matrices that write to the residual stream.

    It is divided by L, so that the sum of all layers stays of order 1.

    Source: Wang & Komatsuzaki 2021, as in GPT-NeoX-20B, https://arxiv.org/abs/2204.06745.
    """
    return 2 / (cfg.L * cfg.D**0.5)


def embedding_std(cfg: ModelConfig) -> float:
    """Returns the standard deviation of embeddings: small_std, or less if the head is tied.

    A tied head's logits have variance D * std**2, and half of it is added to the first loss: 0.2
    nats with SmallInit, 0.03 with 0.25/sqrt(D). An embedding that is scaled or normalised dominates
    the last layer's output, so that a token's own logit is about sqrt(D) * its length: 1 with 1/D.
    """
    if not cfg.tied:
        return small_std(cfg)
    return head_std(cfg) if cfg.embed_norm or cfg.embed_scale > 1 else 0.25 / cfg.D**0.5


def head_std(cfg: ModelConfig) -> float:
    """Returns the standard deviation of an untied head; its logits then have 1/sqrt(D)."""
    return 1 / cfg.D


# Name in model.init_std -> the standard deviation that a weight has without it
RULES = {
    "embed": embedding_std,
    "positions": embedding_std,
    **dict.fromkeys(("q", "k", "v", "gate", "up"), small_std),
    "o": residual_std,
    "down": residual_std,
    "head": head_std,
}


def initial_std(cfg: ModelConfig, name: str) -> float:
    """Returns the standard deviation of a weight's initial values: model.init_std's or the rule's.

    Args:
        name: a key of RULES.
    """
    return cfg.initial_stds.get(name, RULES[name](cfg))


def build_init(state: nnx.State) -> Callable[[jax.Array], dict[str, Any]]:
    """Builds init(key) -> params from an abstract state whose Params carry `mean` and `std`.

    Each leaf's random stream depends only on its path, so that neither the mesh nor the existence
    of other parameters changes its values.
    """

    def initializer(path, variable):
        meta, value = variable.get_metadata(), variable.get_value()

        def draw(key):
            if not meta["std"]:
                return jnp.full(value.shape, meta["mean"], value.dtype)
            key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
            return meta["std"] * jax.random.normal(key, value.shape, value.dtype)

        return draw

    initializers = param_tree(state, initializer)
    return lambda key: jax.tree.map(lambda draw: draw(key), initializers)

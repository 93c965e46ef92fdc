"""The transformers architectures that models are imported from and exported to."""

from typing import Any

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop import InteropError
from jaxtrain.interop.families.decoder import LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3, SMOLLM3
from jaxtrain.interop.families.family import Family, TensorMapping, differences
from jaxtrain.interop.families.gemma import GEMMA2, GEMMA3
from jaxtrain.interop.families.gpt2 import GPT2
from jaxtrain.interop.families.nanochat import NANOCHAT

# An export takes the first family that computes the model, so that the plain ones come first.
ALL = (LLAMA, MISTRAL, QWEN3, QWEN2, SMOLLM3, OLMO2, GEMMA2, GEMMA3, NANOCHAT, GPT2)
FAMILIES = {family.model_type: family for family in ALL}

__all__ = ["FAMILIES", "Family", "TensorMapping", "family_of_config", "family_of_model"]


def family_of_config(config: dict[str, Any]) -> Family:
    """Returns the family that config.json names.

    transformers takes the class that `model_type` names. `architectures` must not name another.

    Raises:
        InteropError: it names none of FAMILIES, or more than one.
    """
    named = config.get("architectures") or [config.get("model_type")]
    found = [f for f in FAMILIES.values() if named in ([f.architecture], [f.model_type])]
    if not found:
        known = ", ".join(family.architecture for family in FAMILIES.values())
        raise InteropError(f"config.json must name one architecture of {known}; got {named}.")
    return found[0]


def family_of_model(cfg: ModelConfig) -> Family:
    """Returns the first family whose models compute what this model computes.

    Raises:
        InteropError: there is none; the message lists every field in which the nearest differs.
    """
    faults = {kind: differences(family, cfg) for kind, family in FAMILIES.items()}
    kind = min(faults, key=lambda kind: len(faults[kind]))
    if faults[kind]:
        raise InteropError(
            f"an exported model must be one of {', '.join(FAMILIES)}; the nearest, {kind}, does "
            f"not have {', '.join(faults[kind])}."
        )
    return FAMILIES[kind]

"""Checks that stored weights fit the model that a config describes."""

import math
from typing import Any

from jaxtrain.config.model_section import ModelConfig

# Fields that define which function the weights compute; the others affect only how.
MODEL_FIELDS = (
    "L D H G K F V norm norm_eps norm_place norm_gain position mlp qk_norm qk_norm_gain "
    "qk_norm_over tied bias head_bias attention_bias window global_every attention_scale "
    "attention_softcap embed_scale embed_norm logit_softcap logit_softcap_form"
).split()
POSITION_FIELDS = {  # model.position -> further such fields
    "rope": ["rope_theta", "rope_fraction", "rope_scaling", "rope_local_theta", "nope_every"],
    "learned": ["positions"],
}
SCALING_FIELDS = {  # model.rope_scaling -> further such fields
    "none": [],
    "linear": ["rope_factor"],
    "llama3": ["rope_factor", "rope_low_freq", "rope_high_freq", "rope_original_positions"],
}


def same_value(ours: Any, theirs: Any) -> bool:
    """Compares two values. Floats get a tolerance: float32 stores 1e-5 as 9.999999747378752e-06."""
    return ours == theirs or (type(ours) is float and math.isclose(ours, theirs, rel_tol=1e-6))


def check_same_model(
    cfg: ModelConfig,
    theirs: dict,
    whose: str,
    otherwise: str,
    error: type[Exception] = ValueError,
) -> None:
    """Raises `error` if a config's model is not the one that the weights belong to.

    Args:
        theirs: ModelConfig fields of the weights' model; a missing field had its default, as
            it did not exist when the config was stored. Empty: nothing is compared.
        whose: names the weights' model in the message.
        otherwise: what the user can change instead of the model's flags.
    """
    if not theirs:
        return
    theirs = {**vars(ModelConfig()), **theirs}
    fields = MODEL_FIELDS + POSITION_FIELDS[cfg.position] + SCALING_FIELDS[cfg.rope_scaling]
    differing = [field for field in fields if not same_value(getattr(cfg, field), theirs[field])]
    if differing:
        got = "; ".join(f"model.{f}={getattr(cfg, f)!r}, not {theirs[f]!r}" for f in differing)
        flags = " ".join(f"--model.{field}" for field in differing)
        raise error(f"the model must be {whose}; got {got}. Set {flags}, or {otherwise}.")

"""Checks that stored weights fit the model that a config describes."""

import math

from jaxtrain.config.sections import ModelConfig

# ModelConfig's fields that define the function of the weights; the others only how it is computed.
MODEL_FIELDS = "L D H G K F V norm norm_eps position mlp qk_norm tied bias logit_softcap".split()


def _same(ours, theirs) -> bool:
    """Compares values; files written from float32 have 9.999999747378752e-06 for 1e-5."""
    return ours == theirs or (type(ours) is float and math.isclose(ours, theirs, rel_tol=1e-6))


def check_same_model(
    cfg: ModelConfig,
    theirs: dict,
    whose: str,
    otherwise: str,
    error: type[Exception] = ValueError,
) -> None:
    """Raises `error` if a ModelConfig gives the weights another function than `theirs`.

    Args:
        theirs: fields of the ModelConfig that the weights belong to; missing ones are not compared.
        whose: names that model in the message.
        otherwise: what the user can change instead of the model's flags.
    """
    used = {"rope": "rope_theta", "learned": "positions"}
    wrong = [
        f"model.{field}={getattr(cfg, field)!r}, there {theirs[field]!r}"
        for field in (*MODEL_FIELDS, used[cfg.position])
        if field in theirs and not _same(getattr(cfg, field), theirs[field])
    ]
    if wrong:
        flags = " ".join(f"--{fault.split('=')[0]}" for fault in wrong)
        raise error(
            f"the model must be {whose}; got {'; '.join(wrong)}. Set {flags}, or {otherwise}."
        )

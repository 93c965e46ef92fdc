"""Whether weights that exist fit the model that a config asks for."""

import math

# ModelConfig's fields that decide what weights mean; the rest decides how they are computed.
MEANING = "L D H G K F V norm norm_eps position mlp qk_norm tied bias logit_softcap".split()


def _same(ours, theirs) -> bool:
    """Files made from float32 say 9.999999747378752e-06 where 1e-5 is meant."""
    return ours == theirs or (type(ours) is float and math.isclose(ours, theirs, rel_tol=1e-6))


def check_same_model(cfg, theirs: dict, whose: str, otherwise: str, error=ValueError) -> None:
    """Raises `error` where a ModelConfig gives weights another meaning than `theirs`.

    Args:
        theirs: fields of the ModelConfig that the weights belong to; missing ones are not compared.
        whose: names that model in the message.
        otherwise: what the user can change instead of the model's flags.
    """
    used = {"rope": "rope_theta", "learned": "positions"}
    wrong = [
        f"model.{field}={getattr(cfg, field)!r}, there {theirs[field]!r}"
        for field in (*MEANING, used[cfg.position])
        if field in theirs and not _same(getattr(cfg, field), theirs[field])
    ]
    if wrong:
        flags = " ".join(f"--{fault.split('=')[0]}" for fault in wrong)
        raise error(
            f"the model must be {whose}; got {'; '.join(wrong)}. Set {flags}, or {otherwise}."
        )

"""RoPE's fields of config.json.

transformers 5 writes them in `rope_parameters`, earlier versions in `rope_scaling` and at the top
level. `rope_scaling` replaces the whole of `rope_parameters`, so that the two must be equal.

Source: transformers 5.24, modeling_rope_utils.py, RotaryEmbeddingConfigMixin
"""

import functools
from typing import Any

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.config_reader import MISSING, NUMBER, SIZE, TEXT, ConfigReader
from jaxtrain.interop.families.family import Part

OBJECTS = ("rope_parameters", "rope_scaling")
# Further fields of each type: field of config.json -> (field of ModelConfig, its kind).
SCALING = {
    "default": {},
    "linear": {"factor": ("rope_factor", NUMBER)},
    "llama3": {
        "factor": ("rope_factor", NUMBER),
        "low_freq_factor": ("rope_low_freq", NUMBER),
        "high_freq_factor": ("rope_high_freq", NUMBER),
        "original_max_position_embeddings": ("rope_original_positions", SIZE),
    },
}
FIELDS = ("rope_theta", "rope_scaling", *(ours for ours, _ in SCALING["llama3"].values()))


def _contradictions(reader: ConfigReader) -> list[str]:
    """Returns a fault for each field in which `rope_parameters` and `rope_scaling` differ."""
    new, old = (reader.look(name) for name in OBJECTS)
    if not (isinstance(new, dict) and new and isinstance(old, dict) and old):
        return []
    new, old = ({"rope_type": x.get("type", "default")} | x for x in (new, old))
    return [
        f"rope_parameters.{name}={new.get(name)!r} and rope_scaling.{name}={old.get(name)!r}, "
        "which contradict each other"
        for name in sorted((new.keys() | old.keys()) - {"type"})
        if new.get(name) != old.get(name)
    ]


def _spellings(*names: str) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for part in OBJECTS for name in names)


def _read(reader: ConfigReader, values: dict[str, Any], theta: float) -> dict[str, Any]:
    if faults := _contradictions(reader):
        reader.faults += faults
        reader.ignore(OBJECTS)
    kind = reader.take(*_spellings("rope_type", "type"), kind=TEXT, default="default")
    share = reader.take(
        *("partial_rotary_factor", *_spellings("partial_rotary_factor")), kind=NUMBER, default=1.0
    )
    theta = reader.take(*("rope_theta", *_spellings("rope_theta")), kind=NUMBER, default=theta)
    if share != 1.0:
        reader.faults.append(f"partial_rotary_factor={share} (must be 1.0)")
    if kind not in SCALING:
        reader.faults.append(f"RoPE of the type {kind!r} (must be {', '.join(map(repr, SCALING))})")
        return {"rope_theta": theta}
    found = {"rope_theta": theta, "rope_scaling": "none" if kind == "default" else kind}
    # transformers takes the length of the model if llama3's original length is missing.
    absent = {"original_max_position_embeddings": values["positions"]}
    for name, (ours, its_kind) in SCALING[kind].items():
        default = absent.get(name, MISSING)
        found[ours] = reader.take(*_spellings(name), kind=its_kind, default=default)
    return found


def _write(cfg: ModelConfig) -> dict[str, Any]:
    kind = "default" if cfg.rope_scaling == "none" else cfg.rope_scaling
    rope = {"rope_type": kind, "rope_theta": cfg.rope_theta}
    rope |= {name: getattr(cfg, ours) for name, (ours, _) in SCALING[kind].items()}
    config = {"rope_theta": cfg.rope_theta, "rope_parameters": rope}
    # transformers 4 reads scaling only there.
    return config if kind == "default" else config | {"rope_scaling": rope}


def build_rope(theta: float) -> Part:
    """Returns the Part of RoPE in a family whose base is `theta` if config.json has none."""
    return Part(FIELDS, functools.partial(_read, theta=theta), _write)


ROPE = build_rope(10_000.0)

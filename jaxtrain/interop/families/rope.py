"""RoPE's fields of config.json.

transformers 5 writes them in `rope_parameters`, earlier versions in `rope_scaling` and at the top
level. `rope_scaling` replaces the whole of `rope_parameters`, so that the two must be equal.

Source: transformers 5.24, modeling_rope_utils.py, RotaryEmbeddingConfigMixin
"""

from typing import Any

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.config_reader import NUMBER, TEXT, ConfigReader
from jaxtrain.interop.families.family import Part

OBJECTS = ("rope_parameters", "rope_scaling")
THETA = 10_000.0  # if none is given


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


def _read(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    del values
    if faults := _contradictions(reader):
        reader.faults += faults
        reader.ignore(OBJECTS)
    kind = reader.take(*_spellings("rope_type", "type"), kind=TEXT, default="default")
    share = reader.take(
        *("partial_rotary_factor", *_spellings("partial_rotary_factor")), kind=NUMBER, default=1.0
    )
    theta = reader.take(*("rope_theta", *_spellings("rope_theta")), kind=NUMBER, default=THETA)
    if kind != "default":
        reader.faults.append(f"RoPE of the type {kind!r} (must be 'default')")
    if share != 1.0:
        reader.faults.append(f"partial_rotary_factor={share} (must be 1.0)")
    return {"rope_theta": theta}


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
    }


ROPE = Part(("rope_theta",), _read, _write)

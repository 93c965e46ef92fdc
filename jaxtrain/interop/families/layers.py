"""Fields of config.json that say how layers differ: windows, layers without RoPE, and biases.

Source: transformers 5.24, models/{mistral,qwen2,qwen3,smollm3,llama}/configuration_*.py
"""

from collections.abc import Callable
from typing import Any

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.config_reader import COUNT, FLAG, LIST, SIZE, ConfigReader, shown
from jaxtrain.interop.families.family import Part
from jaxtrain.model.layer_kinds import kinds_by_layer

FULL, SLIDING = "full_attention", "sliding_attention"
FULL_NAMES = (FULL, "attention")  # the second is an earlier name


def find_period(marked: list[bool]) -> int | None:
    """Returns the n for which layers n, 2n, ... of 1 to L are marked; 0 if none is.

    Returns None if the marked layers are others.
    """
    period = marked.index(True) + 1 if any(marked) else 0
    layers = range(1, len(marked) + 1)
    return period if marked == [bool(period) and i % period == 0 for i in layers] else None


def layer_types(cfg: ModelConfig) -> list[str]:
    """Returns transformers' name of each layer's attention."""
    return [SLIDING if kind.scoring.window else FULL for kind in kinds_by_layer(cfg)]


def read_layer_types(reader: ConfigReader, L: int) -> list[bool] | None:
    """Returns which layers `layer_types` gives a window; None if the field is missing or null."""
    kinds = reader.take("layer_types", kind=LIST, default=None)
    if kinds is None:
        return None
    if len(kinds) != L or any(kind not in (SLIDING, *FULL_NAMES) for kind in kinds):
        reader.faults.append(
            f"layer_types={shown(kinds)} (must be {FULL} or {SLIDING} in each of {L} layers)"
        )
        return [False] * L
    return [kind == SLIDING for kind in kinds]


def windows(reader: ConfigReader, window: int, slides: list[bool]) -> dict[str, Any]:
    """Returns `window` and `global_every` of a model.

    Args:
        window: of the layers that have one; 0 if config.json has none.
        slides: which layers have a window.
    """
    every = find_period([not x for x in slides])
    if not any(slides):
        return {"window": 0, "global_every": 0}
    if not window:
        reader.faults.append(f"layer_types with {SLIDING}, but no sliding_window")
    if every is None:
        reader.faults.append(
            f"a window in layers {[i + 1 for i, x in enumerate(slides) if x]} (must be all, or all "
            "but every n-th)"
        )
        every = 0
    return {"window": window or 1, "global_every": every}


def _read_size(reader: ConfigReader, absent: int | None) -> int:
    """Returns `sliding_window`, 0 if it is null."""
    if reader.look("sliding_window") is None:
        reader.get("sliding_window")
        return 0
    return reader.take("sliding_window", kind=SIZE, default=absent) or 0


def _read_full(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    if any(read_layer_types(reader, values["L"]) or ()):
        reader.faults.append(f"layer_types with {SLIDING} (must be {FULL})")
    return {}


def _read_mistral(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    """Reads Mistral's window, which is that of all layers."""
    window = _read_size(reader, absent=4_096)
    slides = read_layer_types(reader, values["L"])
    if slides is not None and slides != [window > 0] * values["L"]:
        reader.faults.append("layer_types that are not those of sliding_window")
    return {"window": window}


def _read_qwen(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    """Reads Qwen's window, which layers from max_window_layers on have, or layer_types says."""
    used = reader.take("use_sliding_window", kind=FLAG, default=False)
    window = _read_size(reader, absent=4_096) if used else 0
    first = reader.take("max_window_layers", kind=COUNT, default=28)
    slides = read_layer_types(reader, values["L"])
    if slides is None:
        slides = [window > 0 and i >= first for i in range(values["L"])]
    reader.ignore(["sliding_window"])
    return windows(reader, window, slides)


def _write_qwen(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": cfg.window > 0,
        "sliding_window": cfg.window or None,
        "max_window_layers": 0 if cfg.window else cfg.L,
        "layer_types": layer_types(cfg),
    }


def _read_smollm3(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    """Reads SmolLM3's layers without RoPE, which have its window unless layer_types says else."""
    L = values["L"]
    interval = reader.take("no_rope_layer_interval", kind=SIZE, default=4)
    ropes = reader.take("no_rope_layers", kind=LIST, default=None)
    if ropes is None:
        ropes = [int((i + 1) % interval != 0) for i in range(L)]
    every = find_period([not x for x in ropes[:L]]) if len(ropes) >= L else None
    if every is None:
        reader.faults.append(
            f"no_rope_layers={shown(ropes)} (must have a 0 for every n-th of {L} layers, else 1)"
        )
    used = reader.take("use_sliding_window", kind=FLAG, default=False)
    window = _read_size(reader, absent=None) if used else 0
    slides = read_layer_types(reader, L)
    if slides is None:
        slides = [window > 0 and not x for x in (ropes + [1] * L)[:L]]
    reader.ignore(["sliding_window"])
    return {"nope_every": every or 0} | windows(reader, window, slides)


def _write_smollm3(cfg: ModelConfig) -> dict[str, Any]:
    ropes = [int(kind.rope != "none") for kind in kinds_by_layer(cfg)]
    config = {"no_rope_layers": ropes, "no_rope_layer_interval": cfg.nope_every or cfg.L + 1}
    window = {"use_sliding_window": cfg.window > 0, "sliding_window": cfg.window or None}
    return config | window | {"layer_types": layer_types(cfg)}


def _read_attention_bias(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    del values
    used = reader.take("attention_bias", kind=FLAG, default=False)
    return {"attention_bias": "all" if used else "none"}


def _read_biases(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    found = _read_attention_bias(reader, values)
    if not reader.take("mlp_bias", kind=FLAG, default=False):
        return found | {"bias": False}
    if found["attention_bias"] == "none":
        reader.faults.append("mlp_bias=True (must be False without attention_bias)")
    return {"attention_bias": "none", "bias": True}


def _write_biases(cfg: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": cfg.bias or cfg.attention_bias == "all", "mlp_bias": cfg.bias}


FULL_ATTENTION = Part((), _read_full, lambda cfg: {})
MISTRAL_WINDOW = Part(
    ("window",), _read_mistral, lambda cfg: {"sliding_window": cfg.window or None}
)
QWEN_WINDOWS = Part(("window", "global_every"), _read_qwen, _write_qwen)
SMOLLM3_LAYERS = Part(("window", "global_every", "nope_every"), _read_smollm3, _write_smollm3)
# In Qwen3 all four projections of attention have a bias, or none.
ATTENTION_BIAS = Part(
    ("attention_bias",),
    _read_attention_bias,
    lambda cfg: {"attention_bias": cfg.attention_bias == "all"},
)
BIASES = Part(("attention_bias", "bias"), _read_biases, _write_biases)

Limit = Callable[[ModelConfig], list[str]]


def limit_biases(cfg: ModelConfig) -> list[str]:
    """Returns a fault unless all four projections of attention have a bias, or none."""
    if cfg.attention_bias != "qkv":
        return []
    return ["model.attention_bias='qkv' (must be 'none' or 'all')"]


def limit_periods(cfg: ModelConfig) -> list[str]:
    """Returns a fault for each period of layers that config.json cannot express.

    A period longer than the model has no effect, nor has a window if every layer is global.
    """
    return [
        f"model.{name}={getattr(cfg, name)} (must be 0, or {shortest} to model.L={cfg.L})"
        for name, shortest in (("global_every", 2), ("nope_every", 1))
        if getattr(cfg, name) and not shortest <= getattr(cfg, name) <= cfg.L
    ]


def join_limits(*limits: Limit) -> Limit:
    """Returns a function that returns the faults of all limits."""
    return lambda cfg: [fault for limit in limits for fault in limit(cfg)]

"""Gemma 2 and the text model of Gemma 3.

Source: transformers 5.24, models/gemma2 and models/gemma3
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.config_reader import (
    MISSING,
    NUMBER,
    POSITIVE,
    SIZE,
    TEXT,
    ConfigReader,
)
from jaxtrain.interop.families.decoder import FIELDS, decoder_tensors, softcap
from jaxtrain.interop.families.family import Family, Part, TensorMapping
from jaxtrain.interop.families.layers import (
    FULL,
    SLIDING,
    layer_types,
    read_layer_types,
    windows,
)
from jaxtrain.interop.families.rope import ROPE

WINDOW = 4_096  # of a config.json without sliding_window
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4  # of a Gemma 3 without RoPE's fields


def _tensors(cfg: ModelConfig) -> Iterator[TensorMapping]:
    for tensor in decoder_tensors(cfg):  # a norm of Gemma multiplies by 1 + w
        yield tensor._replace(offset=1.0 if tensor.name.endswith(".gain") else 0.0)


def _embed_scale(cfg: Any) -> float:
    """Returns sqrt(D), rounded to float32 as the buffer that transformers stores it in."""
    return float(np.float32(cfg.D**0.5))


def _read_query_scale(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    scalar = reader.take("query_pre_attn_scalar", kind=POSITIVE, default=256)
    return {"attention_scale": 0.0 if scalar == values["K"] else scalar**-0.5}


def _query_scalar(cfg: ModelConfig) -> int:
    return max(1, round(cfg.attention_scale**-2)) if cfg.attention_scale else cfg.K


QUERY_SCALE = Part(
    ("attention_scale",),
    _read_query_scale,
    lambda cfg: {"query_pre_attn_scalar": _query_scalar(cfg)},
)


def _windows(pattern: int, pattern_name: str = "") -> Part:
    """Describes layers with a window, of which every n-th is global.

    Args:
        pattern: n of a config.json without layer_types.
        pattern_name: field that n is in.
    """

    def read(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
        window, L = reader.take("sliding_window", kind=SIZE, default=WINDOW), values["L"]
        n = reader.take(pattern_name, kind=SIZE, default=pattern) if pattern_name else pattern
        slides = read_layer_types(reader, L)
        if slides is None:
            slides = [number % n != 0 for number in range(1, L + 1)]
        return windows(reader, window, slides)

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": cfg.window or WINDOW, "layer_types": layer_types(cfg)}

    return Part(("window", "global_every"), read, write)


def _read_two_ropes(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    new, old = f"rope_parameters.{FULL}", "rope_scaling"
    name = lambda *keys: [f"{part}.{key}" for part in (new, old) for key in keys]
    kind = reader.take(*name("rope_type", "type"), kind=TEXT, default="default")
    theta = reader.take(
        f"{new}.rope_theta", "rope_theta", f"{old}.rope_theta", kind=NUMBER, default=GLOBAL_THETA
    )
    local = f"rope_parameters.{SLIDING}"
    local_theta = reader.take(
        f"{local}.rope_theta", "rope_local_base_freq", kind=POSITIVE, default=LOCAL_THETA
    )
    reader.expect(f"{local}.rope_type", "default")
    # transformers 4 reads `type` there; 5.24 adds it to a rope_type of "default", so that it has no
    # effect.
    only_type = reader.look(f"{old}.type") is not MISSING and (
        reader.look(f"{old}.rope_type") is MISSING
    )
    if kind != "default" and only_type and not isinstance(reader.look("rope_parameters"), dict):
        reader.faults.append(
            f"{old}.type={kind!r} without {old}.rope_type, which versions of transformers read "
            "differently (set rope_type, too)"
        )
    found = {"rope_theta": theta, "rope_local_theta": local_theta if values["window"] else 0.0}
    if kind == "linear":
        factor = reader.take(*name("factor"), kind=POSITIVE)
        return found | {"rope_scaling": "linear", "rope_factor": factor}
    if kind != "default":
        reader.faults.append(f"RoPE of the type {kind!r} (must be 'default' or 'linear')")
    return found


def _write_two_ropes(cfg: ModelConfig) -> dict[str, Any]:
    # transformers before 5 reads the fields at the top level.
    scaling = {}
    if cfg.rope_scaling == "linear":
        scaling = {"rope_type": "linear", "factor": cfg.rope_factor}
    local_theta = cfg.rope_local_theta or LOCAL_THETA
    return {
        "rope_theta": cfg.rope_theta,
        "rope_local_base_freq": local_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": cfg.rope_theta} | scaling,
            SLIDING: {"rope_type": "default", "rope_theta": local_theta},
        },
    }


TWO_ROPES = Part(
    ("rope_theta", "rope_local_theta", "rope_scaling", "rope_factor"),
    _read_two_ropes,
    _write_two_ropes,
)


def _limits(cfg: ModelConfig) -> list[str]:
    faults = []
    if cfg.D % cfg.H:
        faults.append(f"model.D={cfg.D} (must be a multiple of model.H={cfg.H})")
    if cfg.global_every and (not cfg.window or not 2 <= cfg.global_every <= cfg.L):
        faults.append(
            f"model.global_every={cfg.global_every} (must be 0, or with a window 2 to {cfg.L})"
        )
    if not math.isclose(cfg.attention_scale or cfg.K**-0.5, _query_scalar(cfg) ** -0.5):
        faults.append(
            f"model.attention_scale={cfg.attention_scale} (must be 1/sqrt(n) of a whole number n)"
        )
    return faults


def _gemma_3_limits(cfg: ModelConfig) -> list[str]:
    faults = _limits(cfg)
    if bool(cfg.rope_local_theta) != bool(cfg.window):
        words = "above 0 with model.window" if cfg.window else "0 without model.window"
        faults.append(f"model.rope_local_theta={cfg.rope_local_theta} (must be {words})")
    if cfg.rope_scaling not in ("none", "linear"):
        faults.append(f"model.rope_scaling={cfg.rope_scaling!r} (must be 'none' or 'linear')")
    return faults


GEMMA: dict[str, Any] = {
    "tensors": _tensors,
    "prefix": "model.",
    "buffers": ("rotary_emb.inv_freq", "embed_scale"),
    "fields": FIELDS,
    # Gemma 2 has the activation in hidden_activation and another in hidden_act, without effect.
    "ignored": ("hidden_act", "cache_implementation", "_sliding_window_pattern"),
}
FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh", "gelu_new"),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
}
ABSENT = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_key_value_heads": 4,
}
REQUIRES = {
    "norm": "rms",
    "norm_place": "both",
    "position": "rope",
    "mlp": "geglu",
    "bias": False,
    "embed_scale": _embed_scale,
}
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    **GEMMA,
    requires=REQUIRES | {"qk_norm": False},
    fixed=FIXED,
    absent=ABSENT | {"max_position_embeddings": 8_192},
    parts=(
        ROPE,
        QUERY_SCALE,
        _windows(2),
        softcap("attn_logit_softcapping", "attention_softcap", 50.0),
        softcap("final_logit_softcapping", "logit_softcap", 30.0),
    ),
    limits=_limits,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    **GEMMA,
    requires=REQUIRES | {"qk_norm": True},
    fixed=FIXED | {"attn_logit_softcapping": (None,)},
    absent=ABSENT | {"max_position_embeddings": 131_072, "vocab_size": 262_208},
    parts=(
        QUERY_SCALE,
        _windows(6, "sliding_window_pattern"),
        TWO_ROPES,
        softcap("final_logit_softcapping", "logit_softcap", None),
    ),
    limits=_gemma_3_limits,
)

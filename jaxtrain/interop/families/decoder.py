"""Llama and the architectures that differ from it by a few fields.

Source: transformers 5.24, models/{llama,mistral,qwen2,qwen3,smollm3,olmo2}
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.config_reader import POSITIVE, ConfigReader
from jaxtrain.interop.families.family import Family, Part, TensorMapping
from jaxtrain.interop.families.layers import (
    ATTENTION_BIAS,
    BIASES,
    FULL_ATTENTION,
    MISTRAL_WINDOW,
    QWEN_WINDOWS,
    SMOLLM3_LAYERS,
    join_limits,
    limit_biases,
    limit_periods,
)
from jaxtrain.interop.families.rope import ROPE, build_rope

# model.norm_place -> our norms of a layer and their names
NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
GATED_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def decoder_tensors(
    cfg: ModelConfig, mlp: Mapping[str, str] = GATED_MLP
) -> Iterator[TensorMapping]:
    """Yields the tensors of a Llama, and those that its relatives have besides.

    Args:
        mlp: our matrices of the MLP and their names.
    """
    layer = "model.layers.{}."
    yield TensorMapping("embed", "model.embed_tokens.weight")
    for letter in "qkvo":
        projection = f"{layer}self_attn.{letter}_proj"
        yield TensorMapping(f"blocks.attention.{letter}.w", f"{projection}.weight", transposed=True)
        if cfg.bias or letter in {"none": "", "qkv": "qkv", "all": "qkvo"}[cfg.attention_bias]:
            yield TensorMapping(f"blocks.attention.{letter}.b", f"{projection}.bias")
    for name, theirs in mlp.items():
        projection = f"{layer}mlp.{theirs}"
        yield TensorMapping(f"blocks.mlp.{name}.w", f"{projection}.weight", transposed=True)
        if cfg.bias:
            yield TensorMapping(f"blocks.mlp.{name}.b", f"{projection}.bias")
    norms = {f"blocks.{ours}": f"{layer}{theirs}" for ours, theirs in NORMS[cfg.norm_place].items()}
    if cfg.qk_norm:  # one gain [K] for all heads, or one for each entry of each head
        norms |= {f"blocks.attention.{x}_norm": f"{layer}self_attn.{x}_norm" for x in "qk"}
    for ours, theirs in (norms | {"final_norm": "model.norm"}).items() if cfg.norm_gain else ():
        yield TensorMapping(f"{ours}.gain", f"{theirs}.weight")
    if not cfg.tied:
        yield TensorMapping("head", "lm_head.weight")


FIELDS = {
    "hidden_size": "D",
    "num_hidden_layers": "L",
    "num_attention_heads": "H",
    "num_key_value_heads": "G",
    "head_dim": "K",
    "intermediate_size": "F",
    "vocab_size": "V",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "positions",
    "tie_word_embeddings": "tied",
}
ABSENT = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
DECODER: dict[str, Any] = {
    "tensors": decoder_tensors,
    "prefix": "model.",
    "buffers": ("rotary_emb.inv_freq",),
    "fields": FIELDS,
}
REQUIRES = {"norm": "rms", "position": "rope", "mlp": "swiglu", "bias": False}
SILU = ("silu", "swish")


def softcap(name: str, ours: str, absent: float | None) -> Part:
    """Describes a soft-cap: null in config.json is our 0.

    Args:
        absent: its value if the field is missing.
    """

    def read(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
        del values
        null = reader.get(name) is None
        return {ours: 0.0 if null else reader.take(name, kind=POSITIVE, default=absent) or 0.0}

    return Part((ours,), read, lambda cfg: {name: getattr(cfg, ours) or None})


def _width_is_whole_heads(cfg: ModelConfig) -> list[str]:
    return [f"model.D={cfg.D} (must be a multiple of model.H={cfg.H})"] if cfg.D % cfg.H else []


def _without(requires: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {field: value for field, value in requires.items() if field not in fields}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    **DECODER,
    parts=(ROPE, FULL_ATTENTION, BIASES),
    requires=_without(REQUIRES, "bias"),
    fixed={"hidden_act": SILU},
    absent=ABSENT | {"max_position_embeddings": 2_048},
    null={"num_key_value_heads": lambda c: c.H, "head_dim": lambda c: c.D // c.H},
    limits=join_limits(_width_is_whole_heads, limit_biases),
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    **DECODER,
    parts=(ROPE, MISTRAL_WINDOW),
    requires=REQUIRES,
    fixed={"hidden_act": SILU},
    absent=ABSENT | {"max_position_embeddings": 131_072, "num_key_value_heads": 8},
    null={"num_key_value_heads": lambda c: c.H, "head_dim": lambda c: c.D // c.H},
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    **DECODER,
    parts=(ROPE, QWEN_WINDOWS),
    requires=REQUIRES | {"attention_bias": "qkv"},
    fixed={"hidden_act": SILU},
    absent=ABSENT | {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    null={"num_key_value_heads": lambda c: c.H, "head_dim": lambda c: c.D // c.H},
    limits=limit_periods,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    **DECODER,
    parts=(ROPE, QWEN_WINDOWS, ATTENTION_BIAS),
    requires=REQUIRES | {"qk_norm": True},
    fixed={"hidden_act": SILU},
    absent=ABSENT | {"max_position_embeddings": 32_768, "head_dim": 128, "num_key_value_heads": 32},
    null={"num_key_value_heads": lambda c: c.H},
    limits=join_limits(limit_periods, limit_biases),
)
SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    **DECODER,
    parts=(build_rope(2e6), SMOLLM3_LAYERS, BIASES),
    requires=_without(REQUIRES, "bias"),
    fixed={"hidden_act": SILU},
    absent=ABSENT
    | {"max_position_embeddings": 32_768, "num_key_value_heads": 4, "tie_word_embeddings": True},
    null={"num_key_value_heads": lambda c: c.H, "head_dim": lambda c: c.D // c.H},
    ignored=("max_window_layers", "pretraining_tp"),  # in published files; the class has neither
    limits=join_limits(limit_periods, limit_biases),
)
OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    **DECODER,
    parts=(ROPE, FULL_ATTENTION, ATTENTION_BIAS),
    requires=REQUIRES | {"norm_place": "post", "qk_norm": True, "qk_norm_over": "all"},
    fixed={"hidden_act": SILU},
    absent=ABSENT | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2_048},
    null={"num_key_value_heads": lambda c: c.H, "head_dim": lambda c: c.D // c.H},
    limits=limit_biases,
)

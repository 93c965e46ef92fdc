"""Llama and the architectures that differ from it by a few fields.

Source: transformers 5.24, models/llama, models/qwen3 and models/olmo2
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.config_reader import LIST, POSITIVE, ConfigReader, shown
from jaxtrain.interop.families.family import Family, Part, TensorMapping
from jaxtrain.interop.families.rope import ROPE

FULL = ("full_attention", "attention")  # the second is an earlier name


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
        yield TensorMapping(
            f"blocks.attention.{letter}.w",
            f"{layer}self_attn.{letter}_proj.weight",
            transposed=True,
        )
    for name, theirs in mlp.items():
        yield TensorMapping(f"blocks.mlp.{name}.w", f"{layer}mlp.{theirs}.weight", transposed=True)
    norms = {f"blocks.{ours}": f"{layer}{theirs}" for ours, theirs in NORMS[cfg.norm_place].items()}
    if cfg.qk_norm:  # one gain [K] for all heads, or one for each entry of each head
        norms |= {f"blocks.attention.{x}_norm": f"{layer}self_attn.{x}_norm" for x in "qk"}
    for ours, theirs in (norms | {"final_norm": "model.norm"}).items() if cfg.norm_gain else ():
        yield TensorMapping(f"{ours}.gain", f"{theirs}.weight")
    if not cfg.tied:
        yield TensorMapping("head", "lm_head.weight")


def _read_layer_types(reader: ConfigReader, values: dict[str, Any]) -> dict[str, Any]:
    kinds = reader.take("layer_types", kind=LIST, default=None)
    if kinds is not None and (len(kinds) != values["L"] or any(k not in FULL for k in kinds)):
        reader.faults.append(
            f"layer_types={shown(kinds)} (must be full_attention in each of {values['L']} layers)"
        )
    return {}


FULL_ATTENTION = Part((), _read_layer_types, lambda cfg: {})
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
    "parts": (ROPE, FULL_ATTENTION),
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


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    **DECODER,
    requires=REQUIRES | {"qk_norm": False},
    fixed={"hidden_act": SILU, "attention_bias": (False,), "mlp_bias": (False,)},
    absent=ABSENT | {"max_position_embeddings": 2_048},
    null={"num_key_value_heads": lambda c: c.H, "head_dim": lambda c: c.D // c.H},
    limits=_width_is_whole_heads,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    **DECODER,
    requires=REQUIRES | {"qk_norm": True},
    fixed={"hidden_act": SILU, "attention_bias": (False,), "use_sliding_window": (False,)},
    absent=ABSENT | {"max_position_embeddings": 32_768, "head_dim": 128, "num_key_value_heads": 32},
    null={"num_key_value_heads": lambda c: c.H},
    ignored=("sliding_window", "max_window_layers"),  # used only with use_sliding_window
)
OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    **DECODER,
    requires=REQUIRES | {"norm_place": "post", "qk_norm": True, "qk_norm_over": "all"},
    fixed={"hidden_act": SILU, "attention_bias": (False,)},
    absent=ABSENT | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2_048},
    null={"num_key_value_heads": lambda c: c.H, "head_dim": lambda c: c.D // c.H},
)

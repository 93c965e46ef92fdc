"""Maps models to and from Hugging Face families: config.json fields and tensor names.

Source: transformers 5.23, models/gpt2, models/llama and models/qwen3.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop import InteropError


class TensorMapping(NamedTuple):
    """One of our parameters and its tensor in a Hugging Face folder."""

    name: str  # "blocks.attention.q.w"
    hf_name: str  # "model.layers.{}.self_attn.q_proj.weight"; {} is the layer
    transposed: bool = False  # Hugging Face stores outputs first, [O,I]
    part: tuple[int, int] = (0, 1)  # i, n: ours is the i-th of n equal parts of its last dim


class Family(NamedTuple):
    """How one transformers architecture stores a model."""

    architecture: str  # as config.json names it
    tensors: Callable[[ModelConfig], Iterator[TensorMapping]]
    read_config: Callable[[dict[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    prefix: str  # of tensor names; files of the model without its head leave it out
    buffers: tuple[str, ...]  # endings of tensors that are not parameters


def _check_fields(config: dict[str, Any], **expected: Any) -> None:
    """Raises InteropError if config.json asks for what our transformer does not compute."""
    wrong = [
        f"{key}={config[key]!r} (must be {value!r})"
        for key, value in expected.items()
        if config.get(key, value) != value
    ]
    if wrong:
        raise InteropError(
            f"config.json must describe what jaxtrain computes; got {', '.join(wrong)}."
        )


def _llama_tensors(cfg: ModelConfig) -> Iterator[TensorMapping]:
    layer = "model.layers.{}."
    yield TensorMapping("embed", "model.embed_tokens.weight")
    for letter in "qkvo":
        yield TensorMapping(
            f"blocks.attention.{letter}.w",
            f"{layer}self_attn.{letter}_proj.weight",
            transposed=True,
        )
    if cfg.qk_norm:  # one gain [K] for all heads, before RoPE, as in layers.HeadNorm
        for letter in "qk":
            yield TensorMapping(
                f"blocks.attention.{letter}_norm.gain", f"{layer}self_attn.{letter}_norm.weight"
            )
    for name in ("gate", "up", "down"):
        yield TensorMapping(
            f"blocks.mlp.{name}.w", f"{layer}mlp.{name}_proj.weight", transposed=True
        )
    yield TensorMapping("blocks.attention_norm.gain", f"{layer}input_layernorm.weight")
    yield TensorMapping("blocks.mlp_norm.gain", f"{layer}post_attention_layernorm.weight")
    yield TensorMapping("final_norm.gain", "model.norm.weight")
    if not cfg.tied:
        yield TensorMapping("head", "lm_head.weight")


def _rope_theta(config) -> float:
    """Returns RoPE's base: in `rope_parameters` since transformers 5, at the top level before."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InteropError(f"config.json must have plain RoPE over whole heads; got {rope}.")
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _read_decoder(config: dict, K: int, qk_norm: bool, positions: int) -> ModelConfig:
    """Reads the fields that Llama and Qwen3 share; `positions` is the family's default."""
    H = config["num_attention_heads"]
    return ModelConfig(
        L=config["num_hidden_layers"],
        D=config["hidden_size"],
        H=H,
        G=config.get("num_key_value_heads") or H,
        K=K,
        F=config["intermediate_size"],
        V=config["vocab_size"],
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=_rope_theta(config),
        positions=config.get("max_position_embeddings", positions),
        mlp="swiglu",
        qk_norm=qk_norm,
        tied=config.get("tie_word_embeddings", False),
        dtype="float32",
    )


def _read_llama(config) -> ModelConfig:
    _check_fields(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    K = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return _read_decoder(config, K, qk_norm=False, positions=2_048)


def _read_qwen3(config) -> ModelConfig:
    _check_fields(config, hidden_act="silu", attention_bias=False, use_sliding_window=False)
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise InteropError(
            f"config.json must have layer_types of full_attention; got {config['layer_types']}."
        )
    return _read_decoder(config, config.get("head_dim", 128), qk_norm=True, positions=32_768)


def _write_decoder(cfg, architecture, model_type) -> dict:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": cfg.D,
        "num_hidden_layers": cfg.L,
        "num_attention_heads": cfg.H,
        "num_key_value_heads": cfg.G,
        "head_dim": cfg.K,
        "intermediate_size": cfg.F,
        "vocab_size": cfg.V,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "max_position_embeddings": cfg.positions,
        "tie_word_embeddings": cfg.tied,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def _write_llama(cfg) -> dict:
    return _write_decoder(cfg, "LlamaForCausalLM", "llama") | {"mlp_bias": False}


def _write_qwen3(cfg) -> dict:
    return _write_decoder(cfg, "Qwen3ForCausalLM", "qwen3") | {"use_sliding_window": False}


def _gpt2_tensors(cfg: ModelConfig) -> Iterator[TensorMapping]:
    layer = "transformer.h.{}."
    yield TensorMapping("embed", "transformer.wte.weight")
    yield TensorMapping("positions", "transformer.wpe.weight")
    for kind, ending in (("w", "weight"), ("b", "bias")):  # Conv1D stores inputs first, as we do
        for i, letter in enumerate("qkv"):
            yield TensorMapping(
                f"blocks.attention.{letter}.{kind}", f"{layer}attn.c_attn.{ending}", part=(i, 3)
            )
        yield TensorMapping(f"blocks.attention.o.{kind}", f"{layer}attn.c_proj.{ending}")
        yield TensorMapping(f"blocks.mlp.up.{kind}", f"{layer}mlp.c_fc.{ending}")
        yield TensorMapping(f"blocks.mlp.down.{kind}", f"{layer}mlp.c_proj.{ending}")
    for kind, ending in (("gain", "weight"), ("bias", "bias")):
        yield TensorMapping(f"blocks.attention_norm.{kind}", f"{layer}ln_1.{ending}")
        yield TensorMapping(f"blocks.mlp_norm.{kind}", f"{layer}ln_2.{ending}")
        yield TensorMapping(f"final_norm.{kind}", f"transformer.ln_f.{ending}")
    if not cfg.tied:
        yield TensorMapping("head", "lm_head.weight")


def _read_gpt2(config) -> ModelConfig:
    known = "gelu_new", "gelu_pytorch_tanh"
    if (activation := config.get("activation_function", known[0])) not in known:
        raise InteropError(
            f"config.json must have activation_function of {', '.join(known)}; got {activation!r}."
        )
    _check_fields(
        config,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    D, H = config["n_embd"], config["n_head"]
    return ModelConfig(
        L=config["n_layer"],
        D=D,
        H=H,
        G=H,
        K=D // H,
        F=config.get("n_inner") or 4 * D,
        V=config["vocab_size"],
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        position="learned",
        positions=config["n_positions"],
        mlp="gelu",
        bias=True,
        tied=config.get("tie_word_embeddings", True),
        dtype="float32",
    )


def _write_gpt2(cfg) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": cfg.D,
        "n_layer": cfg.L,
        "n_head": cfg.H,
        "n_inner": cfg.F,
        "vocab_size": cfg.V,
        "layer_norm_epsilon": cfg.norm_eps,
        "n_positions": cfg.positions,
        "activation_function": "gelu_new",
        "tie_word_embeddings": cfg.tied,
    }


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _llama_tensors,
        _read_llama,
        _write_llama,
        "model.",
        ("rotary_emb.inv_freq",),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _llama_tensors,
        _read_qwen3,
        _write_qwen3,
        "model.",
        ("rotary_emb.inv_freq",),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2_tensors,
        _read_gpt2,
        _write_gpt2,
        "transformer.",
        (".attn.bias", ".attn.masked_bias"),
    ),
}


def family_of_config(config: dict[str, Any]) -> Family:
    """Returns the family that config.json names.

    Raises:
        InteropError: it names none of FAMILIES, or the folder needs its own code or quantization.
    """
    named = config.get("architectures") or [config.get("model_type")]
    kinds = [k for k, f in FAMILIES.items() if f.architecture in named or named == [k]]
    if not kinds:
        known = ", ".join(family.architecture for family in FAMILIES.values())
        raise InteropError(f"config.json must name an architecture of {known}; got {named}.")
    # transformers takes the class that model_type names, and runs the folder's code for auto_map.
    _check_fields(config, model_type=kinds[0], quantization_config=None, auto_map=None)
    return FAMILIES[kinds[0]]


def family_of_model(cfg: ModelConfig) -> Family:
    """Returns the family whose models compute what this model computes.

    Raises:
        InteropError: there is none; the message names the fields that prevent it.
    """
    decoder = {"norm": "rms", "position": "rope", "mlp": "swiglu", "bias": False}
    required = {
        "llama": decoder | {"qk_norm": False},
        "qwen3": decoder | {"qk_norm": True},
        "gpt2": {"norm": "layer", "position": "learned", "mlp": "gelu", "bias": True}
        | {"qk_norm": False, "G": cfg.H, "K": cfg.D // cfg.H},
    }
    faults = {
        kind: [
            f"model.{key}={getattr(cfg, key)!r} (must be {value!r})"
            for key, value in (fields | {"logit_softcap": 0.0}).items()
            if getattr(cfg, key) != value
        ]
        for kind, fields in required.items()
    }
    for kind in ("llama", "gpt2") if cfg.D % cfg.H else ():  # transformers requires it
        faults[kind].append(f"model.D={cfg.D} (must be a multiple of model.H={cfg.H})")
    kind = min(faults, key=lambda kind: len(faults[kind]))
    if faults[kind]:
        raise InteropError(
            f"an exported model must be a Llama, a Qwen3 or a GPT-2; the nearest, {kind}, does not "
            f"have {', '.join(faults[kind])}."
        )
    return FAMILIES[kind]

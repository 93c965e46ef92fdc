"""Model families as Hugging Face stores them: config.json's fields, and tensors by name.

Source: transformers 5.23, models/gpt2, models/llama and models/qwen3.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop import InteropError


class TensorMapping(NamedTuple):
    """One of our parameters and its tensor in a Hugging Face folder."""

    name: str  # "blocks.attention.q.w"
    hf_name: str  # "model.layers.{}.self_attn.q_proj.weight"
    transposed: bool = False  # Hugging Face has outputs first, [O,I]
    part: tuple[int, int] = (0, 1)  # which of how many equal parts of their last dim


class Family(NamedTuple):
    architecture: str  # as config.json names it
    tensors: Callable  # ModelConfig -> [TensorMapping]
    read_config: Callable  # dict -> ModelConfig
    write_config: Callable  # ModelConfig -> dict
    prefix: str  # of their names, which some files leave out
    buffers: tuple[str, ...]  # ends of names that hold no parameter


def _must(config, **expected):
    """Raises InteropError where config.json asks for what our transformer does not compute."""
    wrong = [
        f"{key}={config[key]!r} (must be {value!r})"
        for key, value in expected.items()
        if config.get(key, value) != value
    ]
    if wrong:
        raise InteropError(
            f"config.json must describe what jaxtrain computes; got {', '.join(wrong)}."
        )


def _one_of(config, key, allowed):
    if config.get(key, allowed[0]) not in allowed:
        raise InteropError(
            f"config.json must have {key} of {', '.join(allowed)}; got {config[key]!r}."
        )


def _llama_tensors(cfg):
    layer = "model.layers.{}."
    yield TensorMapping("embed", "model.embed_tokens.weight")
    for letter in "qkvo":
        yield TensorMapping(
            f"blocks.attention.{letter}.w",
            f"{layer}self_attn.{letter}_proj.weight",
            transposed=True,
        )
    if cfg.qk_norm:  # one gain [K] for all heads, before RoPE: so have Qwen3 and layers.HeadNorm
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
    """Transformers 5 keeps it among `rope_parameters`, 4 at the top beside `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InteropError(f"config.json must have plain RoPE over whole heads; got {rope}.")
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _decoder(config, K, qk_norm, positions) -> ModelConfig:
    """What Llama and Qwen3 share; `positions` is the family's default."""
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
    _must(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    K = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return _decoder(config, K, qk_norm=False, positions=2_048)


def _read_qwen3(config) -> ModelConfig:
    _must(config, hidden_act="silu", attention_bias=False, use_sliding_window=False)
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise InteropError(
            f"config.json must have layer_types of full_attention; got {config['layer_types']}."
        )
    return _decoder(config, config.get("head_dim", 128), qk_norm=True, positions=32_768)


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


def _gpt2_tensors(cfg):
    layer = "transformer.h.{}."
    yield TensorMapping("embed", "transformer.wte.weight")
    yield TensorMapping("positions", "transformer.wpe.weight")
    for kind, ending in (("w", "weight"), ("b", "bias")):  # their Conv1D has inputs first, as ours
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
    _one_of(config, "activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    _must(
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


def family_of_config(config: dict) -> Family:
    """Returns the family that config.json names.

    Raises:
        InteropError: it names none of FAMILIES, or needs code or a quantization of its own.
    """
    named = config.get("architectures") or [config.get("model_type")]
    found = [k for k, f in FAMILIES.items() if f.architecture in named or named == [k]]
    if not found:
        known = ", ".join(family.architecture for family in FAMILIES.values())
        raise InteropError(f"config.json must name an architecture of {known}; got {named}.")
    # transformers chooses the class by model_type, and by auto_map the folder's own code.
    _must(config, model_type=found[0], quantization_config=None, auto_map=None)
    return FAMILIES[found[0]]


def family_of_model(cfg: ModelConfig) -> Family:
    """Returns the family that computes what a ModelConfig's model computes.

    Raises:
        InteropError: none does; the fields that stand in the way are named.
    """
    decoder = {"norm": "rms", "position": "rope", "mlp": "swiglu", "bias": False}
    wants = {
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
        for kind, fields in wants.items()
    }
    for kind in ("llama", "gpt2") if cfg.D % cfg.H else ():  # so transformers checks
        faults[kind].append(f"model.D={cfg.D} (must be a multiple of model.H={cfg.H})")
    kind = min(faults, key=lambda kind: len(faults[kind]))
    if faults[kind]:
        raise InteropError(
            f"an exported model must be a Llama, a Qwen3 or a GPT-2; the nearest, {kind}, does not "
            f"have {', '.join(faults[kind])}."
        )
    return FAMILIES[kind]

"""GPT-2.

Source: transformers 5.24, models/gpt2
"""

from collections.abc import Iterator

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.family import Family, TensorMapping


def _tensors(cfg: ModelConfig) -> Iterator[TensorMapping]:
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


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    tensors=_tensors,
    prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),
    fields={
        "n_embd": "D",
        "n_layer": "L",
        "n_head": "H",
        "n_inner": "F",
        "vocab_size": "V",
        "layer_norm_epsilon": "norm_eps",
        "n_positions": "positions",
        "tie_word_embeddings": "tied",
    },
    spellings={
        "n_embd": ("hidden_size",),
        "n_layer": ("num_hidden_layers",),
        "n_head": ("num_attention_heads",),
        # n_ctx was the size of the causal mask in transformers before 4.0.
        "n_positions": ("max_position_embeddings", "n_ctx"),
    },
    requires={
        "norm": "layer",
        "position": "learned",
        "mlp": "gelu",
        "bias": True,
        "qk_norm": False,
        "G": lambda c: c.H,
        "K": lambda c: c.D // c.H,
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    absent={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    null={"n_inner": lambda c: 4 * c.D},
    unused=("rope_theta",),
    limits=lambda c: [f"model.D={c.D} (must be a multiple of model.H={c.H})"] if c.D % c.H else [],
)

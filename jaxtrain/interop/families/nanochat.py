"""nanochat, the architecture of October 2025: no learned gains, and RoPE that turns backwards.

To rotate by the opposite angle is to rotate as we do with the halves of each head exchanged, in the
queries and in the keys. nanochat normalises these after RoPE and we before, which is the same
without a gain: a rotation changes no mean square.

Source: transformers 5.24, models/nanochat; Karpathy 2025, https://github.com/karpathy/nanochat
"""

from collections.abc import Iterator

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.families.decoder import FIELDS, decoder_tensors, softcap
from jaxtrain.interop.families.family import Family, TensorMapping
from jaxtrain.interop.families.rope import ROPE


def _tensors(cfg: ModelConfig) -> Iterator[TensorMapping]:
    for tensor in decoder_tensors(cfg, mlp={"up": "fc1", "down": "fc2"}):
        turns_backwards = tensor.name in ("blocks.attention.q.w", "blocks.attention.k.w")
        yield tensor._replace(swapped=cfg.K if turns_backwards else 0)


NANOCHAT = Family(
    model_type="nanochat",
    architecture="NanoChatForCausalLM",
    tensors=_tensors,
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
    fields=FIELDS,
    parts=(ROPE, softcap("final_logit_softcapping", "logit_softcap", 15.0)),
    requires={
        "norm": "rms",
        "norm_gain": False,
        "position": "rope",
        "mlp": "relu2",
        "qk_norm": True,
        "embed_norm": True,
        "bias": False,
    },
    fixed={"hidden_act": ("relu2",), "attention_bias": (False,)},
    absent={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2_048,
        "intermediate_size": 8_192,
    },
    null={"num_key_value_heads": lambda c: c.H, "head_dim": lambda c: c.D // c.H},
)

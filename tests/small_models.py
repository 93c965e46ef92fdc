"""Small models of each family with random weights, and functions that export and read them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop.hf import read_weights, write_folder
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.routes import choose_routes

SMALL = {"L": 2, "D": 32, "H": 4, "K": 8, "V": 96, "positions": 64, "dtype": "float32"}
LLAMA = ModelConfig(**SMALL, G=2, F=48, norm_eps=1e-5, rope_theta=5e4)
GPT2 = ModelConfig(
    **SMALL,
    G=4,
    F=128,
    norm="layer",
    norm_eps=1e-5,
    position="learned",
    mlp="gelu",
    bias=True,
    tied=True,
)
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_positions": 8}
LLAMA3 |= {"rope_theta": 100.0}  # so that wavelengths of 6 to 200 tokens are on both sides of 8
QWEN3 = dataclasses.replace(LLAMA, D=40, qk_norm=True)  # D is not H * K
GEMMA = dataclasses.replace(
    *(LLAMA,),
    norm_place="both",
    mlp="geglu",
    embed_scale=float(np.float32(32**0.5)),
    tied=True,
    window=5,
)
MODELS = {
    "llama": LLAMA,
    "llama_tied": dataclasses.replace(LLAMA, tied=True),
    "qwen3": QWEN3,
    "qwen3_tied": dataclasses.replace(QWEN3, tied=True),
    "gpt2": GPT2,
    # Of these, 17 tokens exceed the window and rope_original_positions.
    "llama_llama3": dataclasses.replace(LLAMA, **LLAMA3),
    "llama_linear": dataclasses.replace(
        LLAMA, rope_scaling="linear", rope_factor=4.0, attention_bias="all"
    ),
    "llama_bias": dataclasses.replace(LLAMA, bias=True),
    "mistral": dataclasses.replace(LLAMA, D=40, window=5),
    "qwen2": dataclasses.replace(LLAMA, attention_bias="qkv", tied=True),
    "qwen2_window": dataclasses.replace(LLAMA, L=3, attention_bias="qkv", window=5, global_every=2),
    "smollm3": dataclasses.replace(LLAMA, L=5, tied=True, nope_every=4, **LLAMA3),
    "olmo2": dataclasses.replace(LLAMA, norm_place="post", qk_norm=True, qk_norm_over="all"),
    "gemma2": dataclasses.replace(
        GEMMA, global_every=2, attention_softcap=5.0, logit_softcap=3.0, attention_scale=0.5
    ),
    "gemma3": dataclasses.replace(
        *(GEMMA,),
        L=3,
        global_every=3,
        qk_norm=True,
        rope_local_theta=1e3,
        tied=False,
        rope_scaling="linear",
        rope_factor=4.0,
    ),
    "nanochat": dataclasses.replace(
        *(LLAMA,), mlp="relu2", norm_gain=False, embed_norm=True, qk_norm=True, logit_softcap=15.0
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 17))


@functools.cache
def model_of(name):
    cfg = MODELS[name]
    model = build_model(cfg, choose_routes(cfg, False, "cpu", False))
    rng = np.random.default_rng(1)  # gains and biases too, so that a swap of two shows
    draw = lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32)
    params = named_leaves(jax.tree.map(draw, model.shapes))
    if cfg.norm_place == "both":  # Gemma's files have gain - 1, which is exact from 0.5 on
        size = lambda name: 4 if "post_norm" in name else 1  # so that layers outweigh the embedding
        params |= {k: size(k) * (1 + 0.3 * x) for k, x in params.items() if k.endswith("gain")}
    return cfg, model, tree_of(model, params)


def tree_of(model, named):
    """Returns {name: array} as the tree of a model's parameters."""
    leaves = [named[name] for name in named_leaves(model.shapes)]
    return jax.tree.unflatten(jax.tree.structure(model.shapes), leaves)


def logits(model, params):
    return np.asarray(model.logits(params, model.apply(params, TOKENS)))


def export(name, folder, **options):
    cfg, model, params = model_of(name)
    write_folder(folder, cfg, named_leaves(model.axes), named_leaves(params), **options)
    return folder


def read(folder, name):
    cfg, model, _ = model_of(name)
    found = read_weights(folder, cfg, named_leaves(model.axes), named_leaves(model.shapes))
    return {key: load() for key, load in found.items()}

# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A GPT on one screen, built from jaxtrain's parts
#
# Everything that `jaxtrain train` assembles from a config is a function that you can call: the
# model, the loss, the optimizer, the data. Here they train a small byte-level GPT in a loop of your
# own. `docs/minimal.py` shows the same computation without jaxtrain.

# %%
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax

from jaxtrain.config.model_section import ModelConfig
from jaxtrain.config.train_config import DataConfig, LossConfig, MeshConfig, OptimConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.model.loss import build_loss
from jaxtrain.model.transformer import build_model
from jaxtrain.ops.routes import choose_routes
from jaxtrain.optim.build import build_optimizer

STEPS = 60

# %% [markdown]
# **Data.** Any file or folder of text will do; here it is a module of Python's standard library. It
# is encoded once into token shards. Batch n depends only on the data, the seed and n.

# %%
folder = Path(tempfile.mkdtemp())
data = DataConfig(text=str(Path(json.__file__).parent), batch=8, seq_len=64)
corpus = open_corpus(data, "train", 256, folder)
mesh = build_mesh(MeshConfig(), jax.devices()[:1])
batches = build_batches(data, corpus, mesh, seed=0)
print(corpus.describe())

# %% [markdown]
# **Model.** A `Model` is a set of plain functions over a plain dict of arrays. `model.axes` is a
# dict of the same structure whose leaves describe each parameter, for example `L|D->HK`: stacked
# over layers, from D inputs to H*K outputs. Sharding and the optimizer read it.

# %%
shape = ModelConfig(L=2, D=64, H=4, G=2, K=16, F=128, V=256, dtype="float32")
routes = choose_routes(shape, False, jax.devices()[0].platform, strict=False)
model = build_model(shape, routes)
params = model.init(jax.random.key(0))
print(model.axes["blocks"]["attention"]["q"]["w"], params["blocks"]["attention"]["q"]["w"].shape)

# %% [markdown]
# **Loss and optimizer.** The loss never materialises the logits `[B,T,V]`. The optimizer steps
# matrices by Muon and the rest by AdamW; it is an Optax transformation, so you can chain or replace
# it.

# %%
loss_fn = build_loss(LossConfig(), softcap=0.0, dtype=shape.dtype)
optimizer = build_optimizer(OptimConfig(total_steps=STEPS, warmup_steps=5), model.axes)


def objective(params, tokens_BT1):
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    weights_BT = np.full(targets_BT.shape, 1 / targets_BT.size, np.float32)  # a mean
    head_VD = params["head"]
    return loss_fn(model.apply(params, inputs_BT), head_VD, targets_BT, weights_BT)[0]


@jax.jit
def train_step(params, state, tokens_BT1):
    loss, grads = jax.value_and_grad(objective)(params, tokens_BT1)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


# %% [markdown]
# **Train.**

# %%
state, losses = optimizer.init(params), []
for step in range(1, STEPS + 1):
    params, state, loss = train_step(params, state, next(batches)["tokens"])
    losses.append(loss)  # stays on the device until it is printed
    if step % 20 == 0:
        print(f"step {step:3}  loss {float(loss):.3f} nats/byte")
batches.close()
assert losses[-1] < losses[0] - 1.5

# %% [markdown]
# **Sample**, greedily, with the model's key/value cache.

# %%
prompt_BT = np.frombuffer(b"def ", np.uint8)[None].astype(np.int32)
cache = model.init_cache(1, prompt_BT.shape[1] + 40)
hidden_BTD, cache = model.extend(params, cache, prompt_BT, 0)
text = list(prompt_BT[0])
extend = jax.jit(model.extend)
for position in range(prompt_BT.shape[1], prompt_BT.shape[1] + 40):
    token = int(model.logits(params, hidden_BTD[:, -1:])[0, 0].argmax())
    text.append(token)
    hidden_BTD, cache = extend(params, cache, np.array([[token]], np.int32), position)
print(bytes(text).decode(errors="replace"))

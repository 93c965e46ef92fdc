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
# # Use the optimizers with a model of your own
#
# `jaxtrain.optim.recipes` has complete optimizers for any tree of parameters: `muon`, `normuon`
# and `accelerated_lmo` step the matrices, and AdamW steps everything else. They are Optax
# transforms, need no config, and read nothing of jaxtrain's trainer.

# %%
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

from jaxtrain.optim.recipes import accelerated_lmo, describe, eval_params, muon

tokens = jax.random.randint(jax.random.key(0), (16, 9), 0, 32)
inputs, targets = tokens[:, :-1], tokens[:, 1:]


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


# %% [markdown]
# ## Plain JAX
#
# A dict of arrays. `describe` prints who is stepped by what: read it before you train.

# %%
keys = jax.random.split(jax.random.key(1), 3)
params = {
    "embed": jax.random.normal(keys[0], (32, 16)),
    "layer": {"w": jax.random.normal(keys[1], (16, 16)) / 4, "bias": jnp.zeros(16)},
    "head": jax.random.normal(keys[2], (16, 32)) / 16,
}


def loss(params):
    h = params["embed"][inputs]
    h += jax.nn.relu(h @ params["layer"]["w"] + params["layer"]["bias"])
    return cross_entropy(h @ params["head"])


optimizer = muon(learning_rate=0.02, adam_learning_rate=0.01)
describe(optimizer, params)


def train(optimizer, params, loss, steps=10):
    """Returns the parameters and the optimizer's state after some steps."""

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    state, values = optimizer.init(params), []
    for _ in range(steps):
        value, params, state = step(params, state)
        values.append(float(value))
    print(f"loss {values[0]:.3f} -> {values[-1]:.3f}")
    assert values[-1] < values[0]
    return params, state


train(optimizer, params, loss)

# %% [markdown]
# ## Declare axes
#
# The default rule decides by name and rank (its table is in `own_loop.md`). Parameters of three
# or more dims must be declared, as no rule could tell their inputs from their outputs. Axes are
# `stack|inputs->outputs`, one letter for each dim; without an arrow AdamW steps the parameter.
# Declare as many as you like, in a tree like the parameters or by name.

# %%
image = {
    "conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.zeros(8)},
    "attention": {"query": jnp.ones((8, 2, 4)), "out": jnp.ones((2, 4, 8))},
    "position_table": jnp.ones((10, 8)),
}
axes = {
    "conv.kernel": (("layers",), ("height", "width", "in"), ("out",)),  # names instead of letters
    "attention": {"query": "|D->HK", "out": "|HK->D"},
    "position_table": "T|D",
}
try:
    muon(axes=axes).init(image)
except ValueError as error:  # the kernel has four dims, and these axes name five
    print(error)

axes["conv.kernel"] = "|HWI->O"
describe(muon(axes=axes), image)

# %% [markdown]
# ## Flax NNX
#
# `nnx.Optimizer` takes the optimizer as it takes any other of Optax.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.hidden = nnx.Linear(16, 16, rngs=rngs)
        self.head = nnx.Linear(16, 32, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x)
        return self.head(h + nnx.relu(self.hidden(h)))


net = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(net, muon(learning_rate=0.02), wrt=nnx.Param)
describe(optimizer.tx, nnx.state(net, nnx.Param))


@nnx.jit
def nnx_step(net, optimizer):
    value, grads = nnx.value_and_grad(lambda net: cross_entropy(net(inputs)))(net)
    optimizer.update(net, grads)
    return value


values = [float(nnx_step(net, optimizer)) for _ in range(10)]
assert values[-1] < values[0]

# %% [markdown]
# An accelerated optimizer takes gradients ahead of its iterate. Evaluate and save the iterate:

# %%
optimizer = nnx.Optimizer(net, accelerated_lmo(learning_rate=0.02), wrt=nnx.Param)
nnx_step(net, optimizer)
graph, state = nnx.split(net)
iterate = nnx.merge(graph, eval_params(optimizer.opt_state, state))
print(
    f"{cross_entropy(iterate(inputs)):.3f} at the iterate, {cross_entropy(net(inputs)):.3f} ahead"
)

# %% [markdown]
# ## Flax Linen
#
# Dicts and `FrozenDict`s of variables work, in a `TrainState` too.


# %%
class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Embed(32, 16)(x)
        return nn.Dense(32, name="head")(h + nn.relu(nn.Dense(16)(h)))


model = Mlp()
train_state = TrainState.create(
    apply_fn=model.apply,
    params=nn.FrozenDict(model.init(jax.random.key(0), inputs)),
    tx=muon(learning_rate=0.02),
)
describe(train_state.tx, train_state.params)
linen_loss = lambda params: cross_entropy(model.apply(params, inputs))


@jax.jit
def linen_step(train_state):
    return train_state.apply_gradients(grads=jax.grad(linen_loss)(train_state.params))


before = linen_loss(train_state.params)
for _ in range(10):
    train_state = linen_step(train_state)
assert linen_loss(train_state.params) < before

# %% [markdown]
# ## Equinox
#
# Pass the filtered module. Equinox stores a layer's `weight` with its outputs first, which the
# default rule knows; the last layer's name does not say that it is a head, so its axes do.

# %%
mlp = eqx.nn.MLP(8, 32, 16, 1, key=jax.random.key(0))
arrays, static = eqx.partition(mlp, eqx.is_inexact_array)
x = jax.nn.one_hot(inputs % 8, 8)


def equinox_loss(arrays):
    return cross_entropy(jax.vmap(jax.vmap(eqx.combine(arrays, static)))(x))


optimizer = muon(learning_rate=0.02, axes={"layers.1.weight": "|V<-D"})
describe(optimizer, arrays)
train(optimizer, arrays, equinox_loss)

# %% [markdown]
# ## Inside other Optax transforms
#
# Hyperparameters may be values of the program, so that they can change without compiling again:

# %%
injected = optax.inject_hyperparams(muon)(learning_rate=0.02, momentum=0.9)
_, state = train(injected, params, loss)
state.hyperparams["momentum"] = jnp.asarray(0.95)  # from the next update on

# %% [markdown]
# Another optimizer may step a part of the tree. Axes may still name all of it.

# %%
labels = jax.tree.map(lambda p: "muon", params) | {"embed": "sgd"}
mixed = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.multi_transform(
        {"muon": muon(axes={"embed": "V|D", "head": "|D->V"}), "sgd": optax.sgd(0.1)}, labels
    ),
)
describe(mixed, params)
train(mixed, params, loss)

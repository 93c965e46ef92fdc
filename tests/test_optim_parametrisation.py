"""Coordinate checks of optim.parametrisation, and its rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config.train_config import freeze
from jaxtrain.model.transformer import build_model
from jaxtrain.ops.routes import choose_routes
from jaxtrain.optim.build import build_optimizer
from jaxtrain.optim.parametrisation import scale_initial_values

WIDTH, DEPTH, STEPS = 64, 2, 10
OPTIMIZERS = ("muon", "accelerated_lmo", "adamw")
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 17))


def config(width=WIDTH, depth=DEPTH, name="adamw", parametrisation="spectral", **model):
    optim = {"name": name, "parametrisation": parametrisation, "warmup_steps": 0}
    optim |= {"base_width": WIDTH, "base_depth": DEPTH, "schedule": "constant"}
    shape = {"L": depth, "D": width, "H": width // 64, "G": width // 64, "K": 8, "F": width // 8}
    shape |= {"V": 32, "mlp": "gelu", "dtype": "float32", "attention": "reference", "unroll": 1}
    return freeze({"optim": optim, "model": shape | model})


@functools.cache
def changes(*args, **model):
    """Trains on one batch; returns the RMS of the last layer and logits, and of their changes."""
    cfg = config(*args, **model)
    routes = choose_routes(cfg.model, False, "cpu", False)
    network = scale_initial_values(cfg, build_model(cfg.model, routes))
    optimizer = build_optimizer(cfg.optim, network.axes)

    def loss(params):
        states, hidden_BTD = network.hidden_states(params, TOKENS[:, :-1])
        logits_BTV = network.logits(params, hidden_BTD)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), TOKENS[:, 1:, None], -1)
        return -picked.mean(), (states[-1], logits_BTV)

    @jax.jit
    def train(key):
        def step(carry, _):
            params, state = carry
            grads, outputs = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), outputs

        params = network.init(key)
        _, outputs = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS + 1)
        rms = lambda x: jnp.sqrt(jnp.mean(x**2))
        return [rms(x[-1]) for x in outputs], [rms(x[-1] - x[0]) for x in outputs]

    return np.array(train(jax.random.key(0)))

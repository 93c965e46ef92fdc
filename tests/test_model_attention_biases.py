"""On a GPU no pass over [B,T,G,K] adds the biases of keys and values; results stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.model.dense import DENSE, dense_plain
from jaxtrain.model.transformer import build_model
from jaxtrain.ops.routes import Route, choose_routes

SMALL = dict(L=2, D=32, H=4, G=2, K=8, F=48, V=64, dtype="float32", unroll=1, bias=True)
LEARNED = SMALL | dict(position="learned", positions=64)
CASES = {  # the model, and whether the keys' bias has no effect
    "learned positions": (LEARNED, True),
    "GPT-2": (LEARNED | dict(norm="layer", mlp="gelu", G=4), True),
    "RoPE": (SMALL, False),
    "norms of keys": (LEARNED | dict(qk_norm=True), False),
    "soft-cap": (LEARNED | dict(attention_softcap=1.0), False),
}


def random_like(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    draw = lambda key, x: x + 0.3 * jax.random.normal(key, x.shape, x.dtype)
    return jax.tree.unflatten(tree, map(draw, keys, leaves))


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_stay_the_same(case, monkeypatch):
    values, cancels = CASES[case]
    cfg = ModelConfig(**values)
    usual = choose_routes(cfg, False, "cpu", False)
    on_gpu = usual | {"dense": Route("dense", "plain", "gpu"), "attention": usual["attention"]}
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 16), 0, cfg.V)
    results, without_bias = [], set()

    def dense(x_BTI, w_IO, b_O=None):
        if b_O is None:
            without_bias.add(w_IO.shape)
        return dense_plain(x_BTI, w_IO, b_O)

    monkeypatch.setitem(DENSE, "plain", dense)
    for routes in (usual, on_gpu):
        model = build_model(cfg, routes)
        params = random_like(model.init(jax.random.key(0)))

        @jax.jit
        def loss_and_gradient(params, model=model):
            function = lambda params: jnp.square(model.apply(params, tokens_BT)).sum()
            return jax.value_and_grad(function)(params)

        results.append(loss_and_gradient(params))
    (want, want_grads), (got, got_grads) = results
    assert np.allclose(got, want, rtol=1e-5)
    norm = lambda x: float(jnp.linalg.norm(x))
    differences = jax.tree.map(lambda a, b: norm(a - b), got_grads, want_grads)
    scale = max(map(norm, jax.tree.leaves(want_grads)))
    assert max(jax.tree.leaves(differences)) < 1e-5 * scale
    key_bias = got_grads["blocks"]["attention"]["k"]["b"]
    assert (not np.any(key_bias)) == cancels
    assert (cfg.D, cfg.G * cfg.K) in without_bias  # the values, and perhaps the keys

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import LossConfig, MeshConfig
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.model.loss import build_loss, chunk_steps
from jaxtrain.model.loss_scores import max_and_sum
from jaxtrain.ops.routes import Route

B, T, D, V = 8, 33, 16, 48


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    h = jax.random.normal(keys[0], (B, T, D))
    w = jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = (jax.random.uniform(keys[3], (B, T)) > 0.3).astype(jnp.float32)
    return h, w, targets, weights / weights.sum()


def reference(h, w, targets, weights, b, softcap, form, z_loss):
    logits = jnp.einsum("BTD,VD->BTV", h, w) + (0 if b is None else b)
    if softcap:
        x = logits / softcap
        logits = softcap * (jnp.tanh(x) if form == "tanh" else x / jnp.sqrt(1 + x**2))
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (weights * nll).sum() + z_loss * (weights * lse**2).sum(), (weights * nll).sum()


def value_and_grads(loss, h, w, targets, weights, b=None):
    function = lambda h, w, b: loss(h, w, targets, weights, b)
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True))(h, w, b)


@pytest.mark.parametrize(
    "mesh, softcap, form, bias, z_loss, chunk_bytes",
    [
        (None, 0.0, "tanh", False, 0.0, 1 << 26),
        (None, 5.0, "tanh", True, 1e-2, 1 << 10),
        ((2, 2, 2), 0.0, "tanh", False, 0.0, 1 << 10),
        ((2, 2, 2), 5.0, "sqrt", True, 1e-2, 1 << 26),
        ((1, 8, 1), 5.0, "tanh", False, 1e-2, 1 << 10),
    ],
)
def test_value_and_gradients_equal_the_unchunked_ones(
    inputs, mesh, softcap, form, bias, z_loss, chunk_bytes
):
    cfg = LossConfig(z_loss=z_loss, chunk_bytes=chunk_bytes)
    mesh = mesh and build_mesh(MeshConfig(*mesh))
    loss = build_loss(cfg, softcap, jnp.float32, mesh, softcap_form=form)
    inputs = (*inputs, jnp.linspace(-2, 2, V) if bias else None)
    got = value_and_grads(loss, *inputs)
    want = value_and_grads(lambda *args: reference(*args, softcap, form, z_loss), *inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)
    plain = jax.jit(loss)(*inputs)  # without gradients
    assert np.allclose(np.array(plain), np.array(got[0]), rtol=1e-5)


def test_padding_contributes_neither_loss_nor_gradient(inputs):
    h, w, targets, weights = inputs
    loss = build_loss(LossConfig(), 0.0, jnp.float32)
    weights = weights.at[:, 20:].set(0)
    other_targets = jnp.where(jnp.arange(T) < 20, targets, (targets + 7) % V)
    changed = h.at[:, 20:].add(3.0), w, other_targets, weights
    (a, (dh, dw, _)), (b, (_, dw_b, _)) = (
        value_and_grads(loss, h, w, targets, weights),
        value_and_grads(loss, *changed),
    )
    assert a[0] == b[0]
    assert jnp.all(dh[:, 20:] == 0)
    assert jnp.allclose(dw, dw_b, atol=1e-6)


@pytest.mark.parametrize("T", [7, 1_024, 2_048])
def test_chunks_are_as_few_as_possible_and_pad_less_than_one_step_each(T):
    for most in range(1, T // 4 + 1, 9):
        steps = chunk_steps(2, T, 50, 4 * 2 * 50 * most)
        chunks = -(-T // steps)
        assert steps <= most and chunks == -(-T // most)
        assert steps * chunks - T < chunks


def test_the_compiled_loss_has_no_array_of_all_logits(inputs):
    loss = build_loss(LossConfig(), 0.0, jnp.float32)
    program = jax.jit(jax.grad(lambda h, w: loss(h, w, *inputs[2:])[0], argnums=(0, 1)))
    text = program.lower(*inputs[:2]).compile().as_text()
    sizes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    elements = {size: jnp.prod(jnp.array(size)) for size in sizes if V in size}
    assert elements and max(elements.values()) < B * T * V


def test_the_loss_of_a_uniform_head_is_ln_v(inputs):
    h, w, targets, weights = inputs
    loss = build_loss(LossConfig(), 0.0, jnp.float32)
    nats = loss(h, jnp.zeros_like(w), targets, weights)[1]
    assert jnp.allclose(nats, jnp.log(V), rtol=1e-6)


@pytest.mark.parametrize("softcap, bias", [(0.0, False), (5.0, True)])
def test_reading_the_logits_once_gives_the_same_loss_and_gradients(inputs, softcap, bias):
    one_pass = Route("head", "one_pass", "")
    losses = [build_loss(LossConfig(), softcap, jnp.float32, route=r) for r in (None, one_pass)]
    inputs = (*inputs, jnp.linspace(-2, 2, V) if bias else None)
    want, got = (value_and_grads(loss, *inputs) for loss in losses)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_one_pass_over_logits_handles_infinite_and_undefined_ones():
    logits = jax.random.normal(jax.random.key(0), (5, V)) * 100
    logits = logits.at[1, 3].set(jnp.nan).at[2, 4].set(jnp.inf).at[3, 5].set(-jnp.inf)
    logits = logits.at[4].set(-jnp.inf)
    top, total = max_and_sum(logits)
    lse, want = top + jnp.log(total), jax.nn.logsumexp(logits, -1)
    assert jnp.allclose(lse[jnp.array([0, 3])], want[jnp.array([0, 3])], rtol=1e-6)
    assert jnp.isnan(lse[1]) and lse[2] == jnp.inf and lse[4] == -jnp.inf

"""The head's kernel and its gradients, against float64, and the training loss that uses them.

JAX_PLATFORMS=cuda python -m pytest -m gpu runs them on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_references import FULL, HALF, INTERPRET, distance, draw, exact

from jaxtrain.config.train_config import LossConfig, MeshConfig
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.model.loss import build_loss
from jaxtrain.ops.routes import Route
from pallas_kernels.head_scores import (
    REFERENCE_SHIFT,
    head_gradients,
    head_scores,
    head_scores_reference,
    target_logits,
)
from pallas_kernels.tile_order import grouped_tile
from pallas_kernels.tiles import ProductTiles

pytestmark = pytest.mark.gpu


@pytest.fixture
def float64_enabled():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("blocks, tiles, group", [(1, 5, 8), (8, 3, 8), (19, 7, 8), (5, 4, 2)])
def test_each_tile_of_the_head_is_visited_once_and_one_group_after_another(blocks, tiles, group):
    grouped = jax.jit(grouped_tile, static_argnums=(1, 2, 3))
    row, column = map(np.asarray, grouped(np.arange(blocks * tiles), blocks, tiles, group))
    seen = list(zip(row.tolist(), column.tolist(), strict=True))
    assert sorted(seen) == [(i, j) for i in range(blocks) for j in range(tiles)]
    assert all(abs(a // group - b // group) <= 1 for a, b in zip(row[1:], row, strict=False))


HEAD = ProductTiles(32, 64, 32, 4, 2, group=2)


def shifted_target_logits(h, w, targets, softcap=0.0):
    return target_logits(h, w, jnp.asarray(targets), softcap) + REFERENCE_SHIFT


@pytest.mark.parametrize(
    "N, D, V, softcap, dtype", [(64, 64, 256, 0.0, HALF), (70, 40, 1_009, 15.0, FULL)]
)
@pytest.mark.usefixtures("float64_enabled")
def test_head_scores_equal_the_reference(N, D, V, softcap, dtype):
    h, w = draw(0, (N, D), dtype), draw(1, (V, D), dtype) / 4
    targets = np.random.default_rng(2).integers(-1, V, N, np.int32)
    reference_N = shifted_target_logits(h, w, targets, softcap)

    @jax.jit
    def fused(h, w, reference_N):
        call = lambda keep: head_scores(h, w, reference_N, HEAD, softcap, keep, INTERPRET)
        return [call(keep) for keep in ("logits", "exponentials", "")]

    logits, exponentials, lean = fused(h, w, reference_N)
    reference = lambda keep: jax.jit(lambda h, w, r: head_scores_reference(h, w, r, softcap, keep))(
        *exact(h, w, np.asarray(reference_N))
    )
    assert distance(logits.kept_NV, reference("logits").kept_NV) < 2e-6
    assert distance(exponentials.kept_NV, reference("exponentials").kept_NV) < 3e-3
    assert lean.kept_NV is None
    for scores in (logits, exponentials, lean):
        assert distance(np.log(scores.total_N), np.log(reference("").total_N)) < 1e-6


@pytest.mark.usefixtures("float64_enabled")
def test_targets_have_the_logits_of_the_product_and_0_outside_the_vocabulary():
    h, w = draw(0, (6, 24), HALF), draw(1, (10, 24), HALF)
    targets = np.array([0, 9, 3, -1, 10, 100], np.int32)
    got = np.asarray(target_logits(h, w, jnp.asarray(targets)))
    logits = np.asarray(exact(h)[0]) @ np.asarray(exact(w)[0]).T
    assert distance(got[:3], logits[np.arange(3), targets[:3]]) < 1e-6
    assert not got[3:].any()
    capped = target_logits(h, w, jnp.asarray(targets), 2.0)
    assert distance(capped, 2 * np.tanh(got / 2)) < 1e-6


def wide_gradients(h, w, targets):
    """Returns the nats, and the gradients of their sum by h and w, in float64."""

    def nats(h, w):
        logits = h @ w.T
        return jax.nn.logsumexp(logits, 1) - logits[jnp.arange(len(h)), targets]

    h, w = exact(h, w)
    return nats(h, w), *jax.grad(lambda h, w: nats(h, w).sum(), (0, 1))(h, w)


@pytest.mark.usefixtures("float64_enabled")
@pytest.mark.parametrize("scale", [0.25, 4.0])  # standard deviations of 2 and 32
def test_gradients_of_kept_exponentials_are_right_for_small_and_large_logits(scale):
    """The targets' logits are near the top, in the middle and 100 nats below it."""
    h, w = draw(0, (16, 64), HALF), (draw(1, (256, 64), HALF) * scale).astype(HALF)
    logits = np.asarray(exact(h)[0]) @ np.asarray(exact(w)[0]).T
    order = np.argsort(-logits, 1)
    least = np.argmin(np.abs(logits - np.maximum(logits.max(1, keepdims=True) - 100, -1e9)), 1)
    targets = np.where(np.arange(16) < 5, order[:, 0], order[:, 100]).astype(np.int32)
    targets[10:] = least[10:]
    scores = head_scores(
        h, w, shifted_target_logits(h, w, targets), HEAD, 0.0, "exponentials", INTERPRET
    )
    weight_N = jnp.ones(16)
    got = head_gradients(scores.kept_NV, h, w, jnp.asarray(targets), weight_N, scores.total_N)
    nats = shifted_target_logits(h, w, targets) + np.log(scores.total_N)
    nats = nats - target_logits(h, w, jnp.asarray(targets))
    want_nats, *want = wide_gradients(h, w, jnp.asarray(targets))
    assert np.allclose(nats, want_nats, rtol=1e-5, atol=1e-4)
    assert all(distance(a, b) < 3e-3 for a, b in zip(got, want, strict=True))


def test_a_token_that_is_far_too_unlikely_has_a_finite_loss_and_gradient():
    h, w = jnp.ones((8, 16), HALF), jnp.zeros((64, 16), HALF).at[7].set(20.0)  # 320 nats
    targets = jnp.zeros(8, jnp.int32)
    reference_N = shifted_target_logits(h, w, targets)
    scores = head_scores(h, w, reference_N, HEAD, 0.0, "exponentials", INTERPRET)
    nats = reference_N + jnp.log(scores.total_N)
    assert np.all((nats > 105) & (nats < 115))
    weight_N = jnp.ones(8)
    dh, dw = head_gradients(scores.kept_NV, h, w, targets, weight_N, scores.total_N)
    assert np.isfinite(dh).all() and np.isfinite(dw).all()
    assert np.all(dw[7] > 0) and np.all(dw[0] < 0)


def relative(got, want):
    return float(jnp.linalg.norm(got.astype(FULL) - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize(
    "dtype, softcap, mesh, limits",
    [
        (HALF, 0.0, (2, 2, 2), (3e-3, 3e-3)),
        (HALF, 15.0, None, (3e-3, 2e-3)),
        (FULL, 0.0, None, (1e-6, 1e-6)),
    ],
)
def test_the_loss_with_the_kernel_equals_the_loss_without(dtype, softcap, mesh, limits):
    """Rows are no whole blocks, chunks are padded, some tokens have no weight, and V is split."""
    if mesh and jax.default_backend() == "gpu":
        pytest.skip("needs eight devices")
    B, T, D, V = 8, 33, 64, 320
    keys = jax.random.split(jax.random.key(0), 4)
    h, w = jax.random.normal(keys[0], (B, T, D), dtype), jax.random.normal(keys[1], (V, D)) / 4
    w = w.astype(dtype).astype(FULL)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = (jax.random.uniform(keys[3], (B, T)) > 0.3) / (B * T)
    cfg = LossConfig(z_loss=1e-3, chunk_bytes=1 << 17)

    def value_and_gradients(h, dtype, mesh, route):
        loss = build_loss(cfg, softcap, dtype, mesh, route)
        function = lambda h, w: loss(h, w, targets, weights)
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(h, w)

    implementation = "fused:triton" + ":interpret" * INTERPRET
    route = Route("head", implementation, "", tiles={"head": HEAD})
    mesh = mesh and build_mesh(MeshConfig(*mesh))
    (got, _), gradients = value_and_gradients(h, dtype, mesh, route)
    (want, _), exact_gradients = value_and_gradients(h.astype(FULL), FULL, None, None)
    assert np.isclose(got, want, rtol=1e-5)
    for a, b, limit in zip(gradients, exact_gradients, limits, strict=True):
        assert relative(a, b) < limit


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("scale", [8, 60])  # the least likely targets are 130 and 1,000 nats down
def test_a_diverged_model_has_finite_gradients_that_raise_the_targets(dtype, scale):
    """Weights are those of half a million tokens: without a scale the gradients underflowed."""
    B, T, D, V = 2, 8, 32, 256
    keys = jax.random.split(jax.random.key(0), 3)
    h = jax.random.normal(keys[0], (B, T, D), dtype)
    w = (scale * jax.random.normal(keys[1], (V, D))).astype(dtype).astype(FULL)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jnp.full((B, T), 2.0**-19)

    def value_and_gradients(route):
        loss = build_loss(LossConfig(), 0.0, dtype, None, route)
        function = lambda h, w: loss(h, w, targets, weights)[0]
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(h, w)

    implementation = "fused:triton" + ":interpret" * INTERPRET
    route = Route("head", implementation, "", tiles={"head": HEAD})
    (got, got_grads), (want, want_grads) = map(value_and_gradients, (route, None))
    assert np.isfinite(got) and got <= want * (1 + 1e-3)
    for a, b in zip(got_grads, want_grads, strict=True):
        a, b = a.astype(FULL), b.astype(FULL)
        cosine = jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
        assert np.isfinite(a).all() and cosine > 0.5

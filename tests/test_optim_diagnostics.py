import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim import diagnostics
from jaxtrain.optim.build import build_optimizer
from jaxtrain.optim.lmo import scale_by_lmo
from jaxtrain.optim.noise import symmetric_lomax

AXES = {"w": Axes.parse("L|D->F"), "head": Axes.parse("|V<-D"), "gain": Axes.parse("|D")}
SHAPES = {"w": (3, 12, 20), "head": (32, 12), "gain": (12,)}
CFG = OptimConfig()


def draw(seed=0):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {k: jax.random.normal(key, s) for key, (k, s) in zip(keys, SHAPES.items(), strict=True)}


def with_singular_values(values, rows=12, columns=20):
    q = lambda n, seed: np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    middle = np.zeros((rows, columns))
    np.fill_diagonal(middle, values)
    return jnp.asarray(q(rows, 0) @ middle @ q(columns, 1), jnp.float32)


def gram(x):
    return diagnostics._gram(AXES["w"], jnp.stack([x, x]), per_head=False)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_spectra_are_those_of_the_matrix_whatever_its_size(size):
    values = np.linspace(1, 12, 12)
    rank, condition = diagnostics.spectrum(gram(size * with_singular_values(values)))
    np.testing.assert_allclose(rank, np.sum(values**2) / 144, rtol=1e-4)
    np.testing.assert_allclose(condition, 12, rtol=1e-3)


def test_the_condition_of_a_singular_matrix_ends_where_its_docstring_says():
    _, condition = diagnostics.spectrum(gram(with_singular_values([1.0] * 11 + [0.0])))
    np.testing.assert_allclose(condition, 2896, rtol=1e-3)


def test_a_semi_orthogonal_update_has_no_error_and_a_rank_one_update_the_largest():
    even = diagnostics.orthogonality_error(gram(with_singular_values([3.0] * 12)))
    np.testing.assert_allclose(even, 0, atol=2e-3)  # the root of float32's rounding
    one = diagnostics.orthogonality_error(gram(with_singular_values([1.0] + [0.0] * 11)))
    np.testing.assert_allclose(one, 11**0.5, rtol=1e-4)


def test_the_dual_norm_of_spectral_steps_is_the_sum_of_singular_values():
    grads = draw()
    found = diagnostics.dual_norms(CFG, AXES, grads)
    nuclear = np.linalg.svd(np.asarray(grads["w"], np.float64), compute_uv=False).sum()
    assert set(found) == {"optim/matrices/gradient_dual_norm"}
    np.testing.assert_allclose(found["optim/matrices/gradient_dual_norm"], nuclear, rtol=1e-3)


def test_every_role_has_the_dual_of_its_own_norm():
    grads = draw()
    found = diagnostics.dual_norms(OptimConfig(rest="lmo"), AXES, grads)
    head, gain = np.asarray(grads["head"]), np.asarray(grads["gain"])
    np.testing.assert_allclose(
        found["optim/head/gradient_dual_norm"], np.abs(head).sum() / 12, rtol=1e-5
    )
    np.testing.assert_allclose(
        found["optim/vector/gradient_dual_norm"], 12**0.5 * np.linalg.norm(gain), rtol=1e-5
    )


def test_sizes_are_root_mean_squares_and_steepest_descent_has_cosine_one():
    params, grads = draw(0), draw(1)
    updates = jax.tree.map(lambda g: -0.1 * g, grads)
    found = diagnostics.weight_and_update_sizes(CFG, AXES, params, grads, updates)
    rms = lambda *xs: np.sqrt(np.mean(np.concatenate([np.ravel(x) for x in xs]) ** 2))
    np.testing.assert_allclose(found["optim/matrices/step_gradient_cosine"], 1, rtol=1e-6)
    np.testing.assert_allclose(
        found["optim/rest/weight_rms"], rms(params["head"], params["gain"]), rtol=1e-6
    )
    np.testing.assert_allclose(found["optim/matrices/update_rms"], 0.1 * rms(grads["w"]), rtol=1e-6)


@pytest.mark.parametrize("name", ["muon", "normuon", "accelerated_lmo", "adamw"])
@pytest.mark.parametrize("rest", ["adamw", "lmo"])
def test_the_averaged_gradient_is_found_in_every_optimizers_state(name, rest):
    params, grads = draw(0), draw(1)
    optimizer = build_optimizer(OptimConfig(name=name, rest=rest, clip_norm=0.0), AXES)
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    found = diagnostics.averaged_gradients(state, params)
    named = {path[0].key: x for path, x in found.items()}
    assert set(named) == set(AXES)
    for key, x in named.items():  # after one step from rest it is a multiple of the gradient
        share = x / grads[key]
        np.testing.assert_allclose(share, share.ravel()[0], rtol=1e-4)
        assert 0 < share.ravel()[0] <= 0.11


def test_the_noise_scale_of_a_known_covariance_comes_out():
    parts, tokens, steps, sigma = 8, 4, 200, 3.0
    rng = np.random.default_rng(0)
    true = rng.normal(size=200)
    draws = true + sigma / tokens**0.5 * rng.normal(size=(steps, parts, 200))
    small = np.mean(np.sum(draws**2, -1), -1)
    large = np.sum(draws.mean(1) ** 2, -1)
    found = [
        diagnostics.noise_scales({"g": s}, {"g": m}, tokens, parts)
        for s, m in zip(small, large, strict=True)
    ]
    noise, signal = (
        np.array([f[f"optim/g/{n}"] for f in found]) for n in ("gradient_noise", "gradient_signal")
    )
    within = lambda x, value: abs(x.mean() - value) < 4 * x.std() / steps**0.5
    assert within(noise, sigma**2 * 200) and within(signal, np.sum(true**2))
    assert found[0]["optim/all/gradient_noise"] == found[0]["optim/g/gradient_noise"]


def test_a_signal_that_does_not_show_gives_an_infinite_noise_scale():
    found = diagnostics.noise_scales({"g": jnp.float32(8.0)}, {"g": jnp.float32(0.5)}, 4, 8)
    assert found["optim/g/gradient_signal"] < 0
    assert found["optim/g/noise_scale_tokens"] == jnp.inf


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.5])
def test_the_tail_index_of_heavy_tailed_differences_comes_out(alpha):
    a, b = (symmetric_lomax(jax.random.key(i), (400_000,), alpha) for i in (0, 1))
    found = diagnostics.tail_index([100 * (a - b)[:200_000], (a - b)[200_000:]])
    np.testing.assert_allclose(found, alpha, rtol=0.15)


def test_normal_differences_show_no_heavy_tail():
    assert diagnostics.tail_index([jax.random.normal(jax.random.key(0), (400_000,))]) > 4


def test_parameters_without_gradients_do_not_hide_the_tail_of_the_others():
    d = symmetric_lomax(jax.random.key(0), (100_000,), 1.5)
    alone, beside = diagnostics.tail_index([d]), diagnostics.tail_index([d, jnp.zeros(1000)])
    np.testing.assert_allclose(alone, beside, rtol=0.05)
    assert jnp.isfinite(diagnostics.tail_index([jnp.zeros(1000)]))


def test_the_update_of_muon_is_nearly_orthogonal_and_a_gradient_is_not():
    grads = draw()
    step = scale_by_lmo(AXES["w"], coefficients="polar_express", steps=8, dtype=jnp.float32)
    updates, _ = step.update(grads["w"], step.init(grads["w"]))
    at = {path: grads["w"] for path, _ in jax.tree_util.tree_leaves_with_path({"w": 0})}
    found = diagnostics.spectra(CFG, {"w": AXES["w"]}, at, {"w": updates})
    raw = diagnostics.spectra(CFG, {"w": AXES["w"]}, at, {"w": grads["w"]})
    name = "optim/matrices/update_orthogonality_error"
    assert found[name] < 0.01 and raw[name] > 0.5

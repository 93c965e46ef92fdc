import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import OptimConfig
from jaxtrain.optim import diagnostics
from jaxtrain.optim.build import OPTIMIZERS, build_optimizer
from jaxtrain.optim.muon import scale_by_muon
from jaxtrain.optim.newton_schulz import NewtonSchulz
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
def test_rank_and_condition_do_not_depend_on_the_scale_of_the_matrix(size):
    values = np.linspace(1, 12, 12)
    rank, condition = diagnostics.spectrum(gram(size * with_singular_values(values)))
    np.testing.assert_allclose(rank, np.sum(values**2) / 144, rtol=1e-4)
    np.testing.assert_allclose(condition, 12, rtol=1e-3)


def test_the_condition_of_a_singular_matrix_saturates_at_2896():
    _, condition = diagnostics.spectrum(gram(with_singular_values([1.0] * 11 + [0.0])))
    np.testing.assert_allclose(condition, 2896, rtol=1e-3)


def test_the_orthogonality_error_is_0_for_equal_singular_values_and_largest_for_rank_one():
    even = diagnostics.orthogonality_error(gram(with_singular_values([3.0] * 12)))
    np.testing.assert_allclose(even, 0, atol=2e-3)  # the root of float32's rounding error
    rank_one = diagnostics.orthogonality_error(gram(with_singular_values([1.0] + [0.0] * 11)))
    np.testing.assert_allclose(rank_one, 11**0.5, rtol=1e-4)


def test_the_dual_norm_of_spectral_steps_is_the_sum_of_singular_values():
    grads = draw()
    metrics = diagnostics.dual_norms(CFG, AXES, grads)
    nuclear = np.linalg.svd(np.asarray(grads["w"], np.float64), compute_uv=False).sum()
    assert set(metrics) == {"optim/matrices/gradient_dual_norm"}
    np.testing.assert_allclose(metrics["optim/matrices/gradient_dual_norm"], nuclear, rtol=1e-3)


def test_with_rest_lmo_every_role_reports_the_dual_of_its_norm():
    grads = draw()
    metrics = diagnostics.dual_norms(OptimConfig(rest="lmo"), AXES, grads)
    head, gain = np.asarray(grads["head"]), np.asarray(grads["gain"])
    np.testing.assert_allclose(
        metrics["optim/head/gradient_dual_norm"], np.abs(head).sum() / 12, rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["optim/vector/gradient_dual_norm"], 12**0.5 * np.linalg.norm(gain), rtol=1e-5
    )


def test_sizes_are_root_mean_squares_and_steepest_descent_has_cosine_one():
    params, grads = draw(0), draw(1)
    updates = jax.tree.map(lambda g: -0.1 * g, grads)
    metrics = diagnostics.weight_and_update_sizes(CFG, AXES, params, grads, updates)
    rms = lambda *xs: np.sqrt(np.mean(np.concatenate([np.ravel(x) for x in xs]) ** 2))
    np.testing.assert_allclose(metrics["optim/matrices/step_gradient_cosine"], 1, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["optim/rest/weight_rms"], rms(params["head"], params["gain"]), rtol=1e-6
    )
    np.testing.assert_allclose(
        metrics["optim/matrices/update_rms"], 0.1 * rms(grads["w"]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "rest"),
    [*((name, "adamw") for name in OPTIMIZERS), ("accelerated_lmo", "lmo"), ("muon", "lmo")],
)
def test_the_averaged_gradient_is_found_in_every_optimizers_state(name, rest):
    params, grads = draw(0), draw(1)
    optimizer = build_optimizer(OptimConfig(name=name, rest=rest, clip_norm=0.0), AXES)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for _ in range(2):  # SOAP's first step does not average
        _, state = update(grads, state, params)
    averages = {p[0].key: x for p, x in diagnostics.averaged_gradients(state, params).items()}
    assert set(averages) == set(AXES)
    if name == "muown":  # averages the part of the gradient that turns rows
        del averages["w"]
    for key, average in averages.items():  # of equal gradients: a multiple of them
        share = average / grads[key]
        np.testing.assert_allclose(share, share.ravel()[0], rtol=1e-4)
        assert 0 < share.ravel()[0] <= 0.2


def test_noise_and_signal_of_a_known_covariance_are_recovered():
    parts, tokens, steps, sigma = 8, 4, 200, 3.0
    rng = np.random.default_rng(0)
    true = rng.normal(size=200)
    draws = true + sigma / tokens**0.5 * rng.normal(size=(steps, parts, 200))
    small = np.mean(np.sum(draws**2, -1), -1)
    large = np.sum(draws.mean(1) ** 2, -1)
    metrics = [
        diagnostics.noise_scales({"g": s}, {"g": m}, tokens, parts)
        for s, m in zip(small, large, strict=True)
    ]
    collect = lambda name: np.array([m[f"optim/g/{name}"] for m in metrics])
    noise, signal = collect("gradient_noise"), collect("gradient_signal")
    within = lambda x, value: abs(x.mean() - value) < 4 * x.std() / steps**0.5
    assert within(noise, sigma**2 * 200) and within(signal, np.sum(true**2))
    assert metrics[0]["optim/all/gradient_noise"] == metrics[0]["optim/g/gradient_noise"]


def test_a_negative_signal_gives_an_infinite_noise_scale():
    metrics = diagnostics.noise_scales({"g": jnp.float32(8.0)}, {"g": jnp.float32(0.5)}, 4, 8)
    assert metrics["optim/g/gradient_signal"] < 0
    assert metrics["optim/g/noise_scale_tokens"] == jnp.inf


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.5])
def test_the_tail_index_of_heavy_tailed_differences_is_recovered(alpha):
    a, b = (symmetric_lomax(jax.random.key(i), (400_000,), alpha) for i in (0, 1))
    index = diagnostics.tail_index([100 * (a - b)[:200_000], (a - b)[200_000:]])
    np.testing.assert_allclose(index, alpha, rtol=0.15)


def test_normal_differences_have_a_tail_index_above_4():
    assert diagnostics.tail_index([jax.random.normal(jax.random.key(0), (400_000,))]) > 4


def test_zero_gradients_do_not_change_the_tail_index():
    d = symmetric_lomax(jax.random.key(0), (100_000,), 1.5)
    with_zeros = diagnostics.tail_index([d, jnp.zeros(1000)])
    np.testing.assert_allclose(with_zeros, diagnostics.tail_index([d]), rtol=0.05)
    assert jnp.isfinite(diagnostics.tail_index([jnp.zeros(1000)]))


def test_the_update_of_muon_is_nearly_orthogonal_and_a_gradient_is_not():
    grads = draw()
    muon = scale_by_muon(AXES["w"], NewtonSchulz("polar_express", steps=8), dtype=jnp.float32)
    updates, _ = muon.update(grads["w"], muon.init(grads["w"]))
    moments = {path: grads["w"] for path, _ in jax.tree_util.tree_leaves_with_path({"w": 0})}
    metrics = diagnostics.spectra(CFG, {"w": AXES["w"]}, moments, {"w": updates})
    raw = diagnostics.spectra(CFG, {"w": AXES["w"]}, moments, {"w": grads["w"]})
    name = "optim/matrices/update_orthogonality_error"
    assert metrics[name] < 0.01 and raw[name] > 0.5

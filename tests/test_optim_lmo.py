import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.axes import Axes
from jaxtrain.optim.lmo import GEOMETRIES, SCALES, scale_by_lmo
from jaxtrain.optim.newton_schulz import NewtonSchulz

MATRIX = Axes.parse("L|D->F")
SPECTRAL = NewtonSchulz("polar_express", steps=8)  # exact to 1e-3


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def first_step(geometry, grads, axes=MATRIX, **options):
    transform = scale_by_lmo(axes, geometry, **{"dtype": jnp.float32} | options)
    return jax.jit(transform.update)(grads, transform.init(grads))[0]


def singular_values(x_XIO):
    return np.linalg.svd(np.asarray(x_XIO, np.float64), compute_uv=False)


NORMS = {
    "spectral": lambda u: singular_values(u).max(-1),
    "sign": lambda u: np.abs(u).max((-2, -1)) * u.shape[-2],
    "column_norm": lambda u: np.sqrt(np.mean(u**2, -1)).max(-1),
    "row_norm": lambda u: np.sqrt(np.sum(u**2, -2) * u.shape[-2]).max(-1),
    "frobenius": lambda u: np.sqrt(np.mean(u**2, (-2, -1))),
}


@pytest.mark.parametrize("geometry", NORMS)
def test_a_step_has_unit_norm_and_no_other_unit_step_descends_further(geometry):
    g, norm = normal(2, 12, 20), NORMS[geometry]
    unit = SPECTRAL if geometry == "spectral" else geometry
    u = np.asarray(first_step(unit, g, scale="none"), np.float64)
    np.testing.assert_allclose(norm(u), 1, rtol=1e-4)
    gain = np.sum(u * np.asarray(g), (-2, -1))
    for seed in range(1, 30):
        other = np.asarray(normal(2, 12, 20, seed=seed), np.float64) + 0.3 * seed * u
        other /= norm(other)[:, None, None]
        assert (np.sum(other * np.asarray(g), (-2, -1)) <= gain * (1 + 1e-4)).all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_step_does_not_depend_on_the_size_of_the_gradient(geometry, size):
    g = normal(2, 8, 6)
    step = lambda g: first_step(geometry, g, momentum=0.0)
    np.testing.assert_allclose(step(size * g), step(g), rtol=2e-6)
    assert not jnp.any(step(0 * g))


def test_a_geometry_may_be_a_function():
    g = normal(1, 4, 6)
    halved = first_step(lambda x_XIO: x_XIO / 2, g, momentum=0.0, scale="none")
    np.testing.assert_array_equal(halved, g / 2)


def test_with_per_head_every_head_is_a_matrix_of_its_own():
    g = normal(2, 12, 4, 3)  # [L,D,H,K]
    steps = first_step(SPECTRAL, g, Axes.parse("L|D->HK"), per_head=True)
    for head in range(4):
        expected = first_step(SPECTRAL, g[:, :, head])
        np.testing.assert_allclose(steps[:, :, head], expected, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_buffer_halves_the_state_and_changes_the_step_little():
    g = normal(2, 16, 24)
    state_bytes = lambda dtype: (
        scale_by_lmo(MATRIX, SPECTRAL, buffer_dtype=dtype).init(g).momentum.nbytes
    )
    assert state_bytes(jnp.bfloat16) * 2 == state_bytes(None)
    a, b = first_step(SPECTRAL, g), first_step(SPECTRAL, g, buffer_dtype=jnp.bfloat16)
    assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 2e-2
    assert b.dtype == jnp.float32


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_a_factor_of_the_same_direction(scale):
    g = normal(1, 16, 36)
    unit = first_step("frobenius", g, scale="none")
    scaled = first_step("frobenius", g, scale=scale)
    np.testing.assert_allclose(scaled, SCALES[scale](16, 36) * unit, rtol=1e-6)


def test_approximate_variance_reduction_is_nesterovs_momentum():
    """MARS-M with one gradient a step, unclipped and gamma = 1 - beta, is Nesterov's momentum.

    Source: https://arxiv.org/abs/2510.21800
    """
    beta, rng = 0.95, np.random.default_rng(0)
    gamma = 1 - beta
    lmo = scale_by_lmo(MATRIX, lambda x_XIO: x_XIO, beta, scale="none", dtype=jnp.float64)
    with jax.enable_x64(True):
        mean = last = np.zeros((1, 6, 8))
        state = lmo.init(jnp.asarray(mean))
        for _ in range(50):
            g = rng.normal(size=(1, 6, 8))
            corrected = g + gamma * beta / (1 - beta) * (g - last)
            mean, last = beta * mean + (1 - beta) * corrected, g
            direction, state = lmo.update(jnp.asarray(g), state)
            np.testing.assert_allclose(direction, mean, rtol=0, atol=1e-12)


def test_an_invalid_momentum_scale_or_geometry_names_its_flag():
    with pytest.raises(ValueError, match="--optim.momentum"):
        scale_by_lmo(MATRIX, "sign", momentum=1.0)
    with pytest.raises(ValueError, match="spectral_max, spectral, .*--optim.scale"):
        scale_by_lmo(MATRIX, "sign", scale="largest")
    with pytest.raises(ValueError, match="sign, column_norm, .*--optim.geometry"):
        scale_by_lmo(MATRIX, "euclid")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.optim import orthogonalize as module
from jaxtrain.optim.orthogonalize import CHUNK_BYTES, COEFFICIENTS

BF16, F32 = jnp.bfloat16, jnp.float32
OPTIONS = ("steps", "coefficients", "dtype", "chunk_bytes")
orthogonalize = jax.jit(module.orthogonalize, static_argnames=OPTIONS)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def with_spectrum(sigma, rows, columns):
    """(x, u, vt): x [rows,columns] has Frobenius norm 1 and singular values in sigma's ratios."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, rows)))
    return jnp.asarray((u * sigma / np.linalg.norm(sigma)) @ v.T, F32), u, v.T


@pytest.mark.parametrize("dtype, slack", [(F32, 0.01), (BF16, 0.03)])
def test_singular_values_land_in_the_band_of_the_coefficients(dtype, slack):
    sigma = np.geomspace(0.02, 1, 64)
    assert sigma[0] / np.linalg.norm(sigma) > 3e-3  # where the band of 5 Jordan steps begins
    x, _, _ = with_spectrum(sigma, 64, 160)
    got = np.linalg.svd(np.asarray(orthogonalize(x, dtype=dtype), np.float64), compute_uv=False)
    assert 0.682 - slack <= got.min() and got.max() <= 1.202 + slack


def test_each_singular_vector_keeps_its_direction_and_its_value_follows_the_polynomial():
    sigma = np.geomspace(0.02, 1, 48)
    x, u, vt = with_spectrum(sigma, 48, 96)
    expected = sigma / np.linalg.norm(sigma)
    a, b, c = COEFFICIENTS["jordan"][0]
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    assert distance(orthogonalize(x, dtype=F32), (u * expected) @ vt) < 1e-4


@pytest.mark.parametrize("shape", [(64, 64), (96, 256), (256, 96)])
def test_bf16_products_stay_within_two_and_a_half_percent_of_float32(shape):
    x = normal(*shape)
    assert distance(orthogonalize(x).astype(F32), orthogonalize(x, dtype=F32)) < 2.5e-2


@pytest.mark.parametrize("dtype, bound", [(F32, 1e-5), (BF16, 2.5e-2)])
def test_scale_does_not_matter_from_1e_minus_30_to_1e30(dtype, bound):
    x = normal(2, 24, 40)
    y = orthogonalize(x, dtype=dtype).astype(F32)
    for scale in (1e-30, 1e-3, 3.0, 1e3, 1e30):
        assert distance(orthogonalize(scale * x, dtype=dtype).astype(F32), y) < bound


def test_a_rotation_of_the_inputs_rotates_the_result():
    x = normal(48, 80)
    q, _ = jnp.linalg.qr(normal(48, 48, seed=1))
    rotate = lambda q, x: jnp.matmul(q, x, precision="highest")  # noqa: E731
    one, other = orthogonalize(rotate(q, x), dtype=F32), rotate(q, orthogonalize(x, dtype=F32))
    assert distance(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_transpose_gives_the_transpose_bitwise(dtype):
    x = normal(3, 24, 56)
    one = orthogonalize(x.mT, dtype=dtype).mT
    assert jnp.array_equal(one, orthogonalize(x, dtype=dtype))


def test_a_stack_is_its_matrices_and_a_chunked_stack_is_the_stack():
    x = normal(6, 32, 48)
    y = orthogonalize(x, dtype=F32)
    loop = jnp.stack([orthogonalize(x[i], dtype=F32) for i in range(6)])
    one_matrix = 4 * (2 * 32 * 48 + 3 * 32 * 32)
    chunked = orthogonalize(x, dtype=F32, chunk_bytes=4 * one_matrix)  # 4 fit, 3 divide 6
    deeper = orthogonalize(x.reshape(2, 3, 32, 48), dtype=F32)
    assert distance(loop, y) < 1e-6
    assert distance(chunked, y) < 1e-6
    assert distance(deeper.reshape(y.shape), y) < 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_zeros_give_zeros_and_no_finite_entry_gives_a_nan(dtype):
    x = jnp.stack([jnp.zeros((8, 12)), normal(8, 12)])
    y = orthogonalize(x, dtype=dtype)
    assert jnp.array_equal(y[0], jnp.zeros((8, 12)))
    assert jnp.any(y[1] != 0)
    limits = jnp.finfo(F32)
    for value in (1e-30, 1e30, float(limits.max), float(limits.tiny), 1e-45):
        for x in (jnp.full((8, 12), value), jnp.zeros((8, 12)).at[2, 3].set(-value)):
            assert jnp.all(jnp.isfinite(orthogonalize(x, dtype=dtype))), value


def test_an_infinite_entry_is_not_hidden():
    assert not jnp.all(jnp.isfinite(orthogonalize(normal(8, 12).at[0, 0].set(jnp.inf))))


def test_further_steps_repeat_the_last_coefficients():
    x, u, vt = with_spectrum(np.geomspace(0.1, 1, 16), 16, 32)
    expected = np.geomspace(0.1, 1, 16)
    expected /= np.linalg.norm(expected)
    a, b, c = COEFFICIENTS["jordan"][-1]
    for _ in range(7):
        expected = a * expected + b * expected**3 + c * expected**5
    assert distance(orthogonalize(x, steps=7, dtype=F32), (u * expected) @ vt) < 1e-4


def test_an_unknown_table_or_no_steps_is_an_error():
    with pytest.raises(ValueError, match="jordan"):
        orthogonalize(normal(4, 4), coefficients="euler")
    with pytest.raises(ValueError, match="steps"):
        orthogonalize(normal(4, 4), steps=0)


def test_a_big_stack_is_iterated_in_chunks_that_fit():
    x = jax.ShapeDtypeStruct((26, 2048, 5632), F32)
    memory = orthogonalize.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * CHUNK_BYTES

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config.train_config import KernelsConfig, ModelConfig
from jaxtrain.ops.fused import build_square
from jaxtrain.ops.routes import choose_routes
from jaxtrain.optim import newton_schulz as module
from jaxtrain.optim.coefficients import COEFFICIENTS, coefficient_table
from jaxtrain.optim.newton_schulz import FORMS

BF16, F32 = jnp.bfloat16, jnp.float32
ROWS, COLUMNS = 48, 128  # one shape and few options: most of the time goes to compiling
OPTIONS = ("steps", "coefficients", "dtype", "form", "chunk_bytes", "square")
orthogonalize = jax.jit(module.orthogonalize, static_argnames=OPTIONS)
# Smallest and largest result of singular values from 3e-3, 1e-2 and 1e-1 of the norm on.
BANDS = {
    "jordan": ((0.682, 1.202), (0.682, 1.134), (0.682, 1.134)),
    "quintic": ((0.978, 1.145), (0.978, 1.032), (0.978, 1.032)),
    "polar_express": ((0.876, 1.086), (0.870, 1.124), (0.870, 1.124)),
}


def run(x, name="jordan", form="auto", dtype=BF16, steps=None):
    return orthogonalize(x, coefficients=name, form=form, dtype=dtype, steps=steps)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def with_spectrum(sigma, rows=ROWS, columns=COLUMNS):
    """(x, u, vt): x [rows,columns] has singular values sigma."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, rows)))
    return jnp.asarray((u * sigma) @ v.T, F32), u, v.T


def follow(sigma, rows):
    for a, b, c in rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def exact(x, table):
    """orthogonalize by singular values, in float64."""
    x = np.asarray(x, np.float64)
    if table.aol:
        x = x / np.sqrt(np.abs(x @ x.T).sum(1, keepdims=True))
    else:
        x = x / (np.linalg.norm(x) * table.safety)
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    return (u * follow(sigma, table.rows)) @ vt


def banded():
    """Singular values that fill each range of BANDS; the squares sum to 1."""
    sigma = np.geomspace(3.02e-3, 0.9, ROWS - 8)
    sigma = np.r_[sigma[sigma**2 < 0.02], np.full(8, 0.3)]
    rest = 1 - np.sum(sigma**2)
    return np.r_[sigma, np.full(ROWS - len(sigma), np.sqrt(rest / (ROWS - len(sigma))))]


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, slack", [(F32, 0.01), (BF16, 0.03)])
def test_singular_values_land_in_the_bands_of_their_ranges(name, form, dtype, slack):
    sigma = banded()
    x, u, vt = with_spectrum(sigma)
    y = np.asarray(run(x, name, form, dtype), np.float64)
    along = np.einsum("im,ij,mj->m", u, y, vt)  # the value of each singular direction
    edges = (3e-3, 1e-2, 1e-1, 1.0)
    for low, high, band in zip(edges[:-1], edges[1:], BANDS[name], strict=True):
        values = along[(low <= sigma) & (sigma < high)]
        assert len(values) >= 8
        assert band[0] - slack <= values.min() <= values.max() <= band[1] + slack
    values = np.linalg.svd(y, compute_uv=False)
    assert min(min(BANDS[name])) - slack <= values.min()
    assert values.max() <= max(band[1] for band in BANDS[name]) + slack


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("form", FORMS)
def test_singular_vectors_stay_and_singular_values_follow_the_polynomials(name, form):
    x, _, _ = with_spectrum(np.geomspace(0.01, 1, ROWS))
    assert distance(run(x, name, form, F32), exact(x, coefficient_table(name))) < 5e-5


def hard_matrices():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    yield "gaussian", draw(ROWS, COLUMNS)
    for kappa in (1e3, 1e5):
        yield f"kappa {kappa:.0e}", with_spectrum(np.geomspace(1 / kappa, 1, ROWS))[0]
    yield "one large value", with_spectrum(np.r_[1, np.full(ROWS - 1, 1e-3)])[0]
    yield "rank 1", draw(ROWS, 1) * draw(1, COLUMNS)
    yield "rank 8", draw(ROWS, 8) @ draw(8, COLUMNS)
    yield "rank 8 and noise", draw(ROWS, 8) @ draw(8, COLUMNS) + 0.01 * draw(ROWS, COLUMNS)
    yield "rows of all sizes", np.exp(3 * draw(ROWS, 1)) * draw(ROWS, COLUMNS)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_gram_form_is_as_close_to_exact_as_the_standard_form(name):
    for case, x in hard_matrices():
        y = exact(x, coefficient_table(name))
        off = {
            (form, dtype): distance(run(jnp.asarray(x, F32), name, form, dtype), y)
            for form in FORMS
            for dtype in (F32, BF16)
        }
        assert off["gram", BF16] <= 1.1 * off["standard", BF16], case
        assert off["gram", F32] <= 1e-5 + 8 * off["standard", F32], case


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_the_gram_form_makes_a_run_of_any_length(steps):
    x = with_spectrum(np.geomspace(0.1, 1, ROWS))[0]
    y = run(x, "jordan", "gram", F32, steps)
    assert distance(y, exact(x, coefficient_table("jordan", steps))) < 1e-4


def test_the_gram_form_is_taken_where_a_matrix_is_twice_as_long_as_wide():
    products = lambda shape, form: (
        orthogonalize.lower(jnp.zeros(shape), form=form, dtype=F32).as_text().count("dot_general")
    )
    assert products((16, 32), "auto") == products((16, 32), "gram")
    assert products((32, 16), "auto") == products((16, 32), "gram")
    assert products((16, 31), "auto") == products((16, 31), "standard")
    assert products((16, 32), "gram") != products((16, 32), "standard")


def test_a_longer_run_is_the_same_loop():
    text = lambda steps: orthogonalize.lower(normal(8, 12), steps=steps).as_text()
    assert text(5).count("dot_general") == text(20).count("dot_general")


@pytest.mark.parametrize("shape", [(64, 96), (128, 512)])
def test_eight_steps_of_polar_express_make_orthonormal_rows(shape):
    x = with_spectrum(np.geomspace(1 / 300, 1, shape[0]), *shape)[0]
    y = np.asarray(run(x, "polar_express", dtype=F32, steps=8), np.float64)
    assert np.linalg.norm(y @ y.T - np.eye(len(y)), 2) <= 1e-5


@pytest.mark.parametrize(
    "name, shape, low, high",
    [("jordan", (256, 1024), 0.915, 0.965), ("polar_express", (ROWS, COLUMNS), 0.975, 1.015)],
)
def test_entries_of_a_random_matrix_get_the_size_of_their_table(name, shape, low, high):
    y = run(normal(*shape), name, "gram").astype(F32)
    assert low <= float(jnp.sqrt(jnp.mean(y**2) * max(shape))) <= high


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_bf16_products_stay_within_two_and_a_half_percent_of_float32(name, form):
    x = normal(ROWS, COLUMNS)
    assert distance(run(x, name, form).astype(F32), run(x, name, form, F32)) < 2.5e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, bound", [(F32, 1e-5), (BF16, 2.5e-2)])
def test_scale_does_not_matter_from_1e_minus_30_to_1e30(dtype, bound, form):
    x = normal(ROWS, COLUMNS)
    y = run(x, "jordan", form, dtype).astype(F32)
    for scale in (1e-30, 1e-3, 3.0, 1e3, 1e30):
        assert distance(run(scale * x, "jordan", form, dtype).astype(F32), y) < bound


@pytest.mark.parametrize("form", FORMS)
def test_a_rotation_of_the_inputs_rotates_the_result(form):
    x = normal(ROWS, COLUMNS)
    q, _ = jnp.linalg.qr(normal(ROWS, ROWS, seed=1))
    rotate = lambda q, x: jnp.matmul(q, x, precision="highest")
    turned = lambda x: run(x, "jordan", form, F32)
    assert distance(turned(rotate(q, x)), rotate(q, turned(x))) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name, dtype", [("jordan", F32), ("jordan", BF16), ("aol4", F32)])
def test_the_transpose_gives_the_transpose_bitwise(name, dtype, form):
    x = normal(3, 24, 56)  # a shape whose transposed dots sum in another order
    assert jnp.array_equal(run(x.mT, name, form, dtype).mT, run(x, name, form, dtype))


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_its_matrices_bitwise(form):
    # Small whole numbers: the norm's sum is exact, XLA may order it as it likes.
    x = jax.random.randint(jax.random.key(0), (6, 32, 64), -4, 5).astype(F32)
    y = run(x, "jordan", form, F32)
    assert jnp.array_equal(y, jnp.stack([run(matrix, "jordan", form, F32) for matrix in x]))
    deeper = run(x.reshape(2, 3, 32, 64), "jordan", form, F32)
    assert jnp.array_equal(y, deeper.reshape(y.shape))


@pytest.mark.parametrize("form", FORMS)
def test_a_chunked_stack_is_the_stack(form):
    x = normal(6, 32, 64)
    one = 4 * (2 * 32 * 64 + 5 * 32 * 32)  # the bytes of a matrix and its temporaries
    chunked = orthogonalize(x, dtype=F32, form=form, chunk_bytes=4 * one)
    assert distance(chunked, run(x, "jordan", form, F32)) < 2e-6
    text = orthogonalize.lower(x, dtype=F32, form=form, chunk_bytes=4 * one).as_text()
    assert "tensor<3x32x64" in text  # 4 or 5 would fit, 3 divide 6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name, dtype",
    [("jordan", F32), ("jordan", BF16), ("polar_express", BF16), ("aol4", F32), ("aol4", BF16)],
)
def test_zeros_give_zeros_and_no_finite_entry_gives_a_nan(name, dtype, form):
    limits = jnp.finfo(F32)
    values = (1.0, 1e-30, 1e30, float(limits.max), float(limits.tiny), 1e-45)
    full = [jnp.full((8, 12), value) for value in values]
    alone = [jnp.zeros((8, 12)).at[2, 3].set(-value) for value in values]
    x = jnp.stack([jnp.zeros((8, 12)), normal(8, 12), *full, *alone])
    y = run(x, name, form, dtype)
    assert jnp.array_equal(y[0], jnp.zeros((8, 12)))
    assert jnp.any(y[1] != 0)
    finite = jnp.all(jnp.isfinite(y), (1, 2))
    assert jnp.all(finite), finite


@pytest.mark.parametrize("name, shape", [("jordan", (1, 64)), ("aol4", (64, 1))])
def test_a_vector_becomes_a_unit_vector_of_its_direction(name, shape):
    x = normal(*shape)
    y = run(x, name).astype(F32)
    assert jnp.sum(x * y) / jnp.linalg.norm(x) / jnp.linalg.norm(y) > 0.999
    assert 0.67 < jnp.linalg.norm(y) < 1.21


def test_an_infinite_entry_is_not_hidden():
    x = normal(ROWS, COLUMNS).at[0, 0].set(jnp.inf)
    assert not any(jnp.all(jnp.isfinite(run(x, form=form))) for form in FORMS)


def test_an_unknown_table_form_or_no_steps_is_an_error():
    with pytest.raises(ValueError, match="--optim.ns_coefficients"):
        orthogonalize(normal(4, 4), coefficients="euler")
    with pytest.raises(ValueError, match="--optim.ns_steps"):
        orthogonalize(normal(4, 4), steps=0)
    with pytest.raises(ValueError, match="auto, standard, gram; got form='fast'"):
        orthogonalize(normal(4, 4), form="fast")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "shape, form",
    [((26, 2048, 5632), "standard"), ((26, 5632, 2048), "gram"), ((12, 768, 768), "standard")],
)
def test_temporaries_stay_below_one_and_a_half_stacks(shape, form, dtype):
    x = jax.ShapeDtypeStruct(shape, F32)
    memory = orthogonalize.lower(x, form=form, dtype=dtype).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 4 * math.prod(shape)


def test_a_placement_holds_inside_the_loop():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    at = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    place = lambda x_XIO: jax.lax.with_sharding_constraint(x_XIO, at("x"))
    function = functools.partial(module.orthogonalize, dtype=F32, place=place, chunk_bytes=0)
    x = jax.device_put(normal(8, 32, 48), at(None, "x"))
    compiled = jax.jit(function, out_shardings=at(None, "x")).lower(x).compile()
    assert compiled.as_text().count(" all-to-all(") == 2  # there and back, none an iteration
    assert not re.search(" all-(gather|reduce)", compiled.as_text())
    assert distance(compiled(x), orthogonalize(normal(8, 32, 48), dtype=F32)) < 2e-6


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("coefficients", ["jordan", "aol4"])
def test_products_by_one_triangle_make_the_same_steps(form, coefficients):
    """In float32, where Newton-Schulz' own rounding does not hide a wrong epilogue."""
    kernels = KernelsConfig(interpret=True)
    square = build_square(choose_routes(ModelConfig(), False, "cpu", False, kernels)["square"])
    x = jax.random.normal(jax.random.key(0), (2, 48, 100))
    options = {"dtype": jnp.float32, "form": form, "coefficients": coefficients}
    fused = orthogonalize(x, square=square, **options)
    plain = orthogonalize(x, **options)
    assert jnp.linalg.norm(fused - plain) < 1e-4 * jnp.linalg.norm(plain)

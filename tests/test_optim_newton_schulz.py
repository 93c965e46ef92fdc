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
from jaxtrain.optim.coefficients import COEFFICIENTS, coefficient_table
from jaxtrain.optim.newton_schulz import NewtonSchulz

FORMS = ("standard", "gram")  # the form "torch" does not take all coefficients
BF16, F32 = jnp.bfloat16, jnp.float32
ROWS, COLUMNS = 48, 128  # one shape for most tests, as compiling takes most of the time
# Bounds of the results for singular values in [0.003, 0.01), [0.01, 0.1) and [0.1, 1) of the norm.
BANDS = {
    "jordan": ((0.682, 1.202), (0.682, 1.134), (0.682, 1.134)),
    "quintic": ((0.978, 1.145), (0.978, 1.032), (0.978, 1.032)),
    "polar_express": ((0.876, 1.086), (0.870, 1.124), (0.870, 1.124)),
}


@functools.cache
def compiled(options):
    return jax.jit(NewtonSchulz(**dict(options)))


def newton_schulz(**options):
    """Returns a jitted NewtonSchulz, one for each set of options."""
    return compiled(tuple(options.items()))


def orthogonalize(x, name="jordan", form="auto", dtype=BF16, steps=None):
    return newton_schulz(coefficients=name, steps=steps, dtype=dtype, form=form)(x)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def with_spectrum(sigma, rows=ROWS, columns=COLUMNS):
    """Returns (x, u, vt) where x [rows,columns] has singular values sigma."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, rows)))
    return jnp.asarray((u * sigma) @ v.T, F32), u, v.T


def apply_polynomials(sigma, rows):
    for a, b, c in rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def exact(x, table):
    """Applies the polynomials to the singular values of x, in float64."""
    x = np.asarray(x, np.float64)
    if table.aol:
        x = x / np.sqrt(np.abs(x @ x.T).sum(1, keepdims=True))
    else:
        x = x / (np.linalg.norm(x) * table.safety)
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    return (u * apply_polynomials(sigma, table.rows)) @ vt


def banded():
    """Returns singular values that fill each range of BANDS; their squares sum to 1."""
    sigma = np.geomspace(3.02e-3, 0.9, ROWS - 8)
    sigma = np.r_[sigma[sigma**2 < 0.02], np.full(8, 0.3)]
    rest = 1 - np.sum(sigma**2)
    return np.r_[sigma, np.full(ROWS - len(sigma), np.sqrt(rest / (ROWS - len(sigma))))]


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, slack", [(F32, 0.01), (BF16, 0.03)])
def test_singular_values_end_in_the_band_of_their_range(name, form, dtype, slack):
    sigma = banded()
    x, u, vt = with_spectrum(sigma)
    y = np.asarray(orthogonalize(x, name, form, dtype), np.float64)
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
def test_singular_vectors_are_unchanged_and_singular_values_follow_the_polynomials(name, form):
    x, _, _ = with_spectrum(np.geomspace(0.01, 1, ROWS))
    assert distance(orthogonalize(x, name, form, F32), exact(x, coefficient_table(name))) < 5e-5


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
            (form, dtype): distance(orthogonalize(jnp.asarray(x, F32), name, form, dtype), y)
            for form in FORMS
            for dtype in (F32, BF16)
        }
        assert off["gram", BF16] <= 1.1 * off["standard", BF16], case
        assert off["gram", F32] <= 1e-5 + 8 * off["standard", F32], case


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_the_gram_form_is_exact_for_any_number_of_steps(steps):
    x = with_spectrum(np.geomspace(0.1, 1, ROWS))[0]
    y = orthogonalize(x, "jordan", "gram", F32, steps)
    assert distance(y, exact(x, coefficient_table("jordan", steps))) < 1e-4


def test_auto_takes_the_gram_form_from_twice_as_long_as_wide():
    def products(shape, form):
        return newton_schulz(form=form).lower(jnp.zeros(shape)).as_text().count("dot_general")

    assert products((16, 32), "auto") == products((16, 32), "gram")
    assert products((32, 16), "auto") == products((16, 32), "gram")
    assert products((16, 31), "auto") == products((16, 31), "standard")
    assert products((16, 32), "gram") != products((16, 32), "standard")


def test_more_steps_do_not_add_operations_to_the_program():
    text = lambda steps: newton_schulz(steps=steps).lower(normal(8, 12)).as_text()
    assert text(5).count("dot_general") == text(20).count("dot_general")


@pytest.mark.parametrize("shape", [(64, 96), (128, 512)])
def test_eight_steps_of_polar_express_make_orthonormal_rows(shape):
    x = with_spectrum(np.geomspace(1 / 300, 1, shape[0]), *shape)[0]
    y = np.asarray(orthogonalize(x, "polar_express", dtype=F32, steps=8), np.float64)
    assert np.linalg.norm(y @ y.T - np.eye(len(y)), 2) <= 1e-5


@pytest.mark.parametrize(
    "name, shape, low, high",
    [("jordan", (256, 1024), 0.915, 0.965), ("polar_express", (ROWS, COLUMNS), 0.975, 1.015)],
)
def test_the_result_of_a_random_matrix_has_the_rms_of_its_coefficients(name, shape, low, high):
    y = orthogonalize(normal(*shape), name, "gram").astype(F32)
    assert low <= float(jnp.sqrt(jnp.mean(y**2) * max(shape))) <= high


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_bf16_products_stay_within_two_and_a_half_percent_of_float32(name, form):
    x = normal(ROWS, COLUMNS)
    narrow, wide = (orthogonalize(x, name, form, dtype).astype(F32) for dtype in (BF16, F32))
    assert distance(narrow, wide) < 2.5e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, bound", [(F32, 1e-5), (BF16, 2.5e-2)])
def test_the_scale_of_the_input_does_not_matter_from_1e_minus_30_to_1e30(dtype, bound, form):
    x = normal(ROWS, COLUMNS)
    y = orthogonalize(x, "jordan", form, dtype).astype(F32)
    for scale in (1e-30, 1e-3, 3.0, 1e3, 1e30):
        assert distance(orthogonalize(scale * x, "jordan", form, dtype).astype(F32), y) < bound


@pytest.mark.parametrize("form", FORMS)
def test_rotating_the_input_rotates_the_result(form):
    x = normal(ROWS, COLUMNS)
    q, _ = jnp.linalg.qr(normal(ROWS, ROWS, seed=1))
    rotate = lambda q, x: jnp.matmul(q, x, precision="highest")
    result = lambda x: orthogonalize(x, "jordan", form, F32)
    assert distance(result(rotate(q, x)), rotate(q, result(x))) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name, dtype", [("jordan", F32), ("jordan", BF16), ("aol4", F32)])
def test_the_result_of_the_transpose_is_the_transpose_bitwise(name, dtype, form):
    x = normal(3, 24, 56)  # a shape whose transposed dots sum in another order
    assert jnp.array_equal(
        orthogonalize(x.mT, name, form, dtype).mT, orthogonalize(x, name, form, dtype)
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_gives_the_results_of_its_matrices_bitwise(form):
    # With small integers the norm's sum is exact in any order.
    x = jax.random.randint(jax.random.key(0), (6, 32, 64), -4, 5).astype(F32)
    y = orthogonalize(x, "jordan", form, F32)
    each = jnp.stack([orthogonalize(matrix, "jordan", form, F32) for matrix in x])
    assert jnp.array_equal(y, each)
    deeper = orthogonalize(x.reshape(2, 3, 32, 64), "jordan", form, F32)
    assert jnp.array_equal(y, deeper.reshape(y.shape))


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_in_chunks_gives_the_result_of_the_whole_stack(form):
    x = normal(6, 32, 64)
    matrix_bytes = 4 * (2 * 32 * 64 + 5 * 32 * 32)  # with its temporaries
    chunked = newton_schulz(form=form, chunk_bytes=4 * matrix_bytes)
    assert distance(chunked(x), orthogonalize(x, "jordan", form, F32)) < 2e-6
    assert "tensor<3x32x64" in chunked.lower(x).as_text()  # 4 would fit, 3 divides 6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name, dtype",
    [("jordan", F32), ("jordan", BF16), ("polar_express", BF16), ("aol4", F32), ("aol4", BF16)],
)
def test_zeros_give_zeros_and_no_finite_entry_gives_a_nan(name, dtype, form):
    limits = jnp.finfo(F32)
    values = (1.0, 1e-30, 1e30, float(limits.max), float(limits.tiny), 1e-45)
    full = [jnp.full((8, 12), value) for value in values]
    sparse = [jnp.zeros((8, 12)).at[2, 3].set(-value) for value in values]
    x = jnp.stack([jnp.zeros((8, 12)), normal(8, 12), *full, *sparse])
    y = orthogonalize(x, name, form, dtype)
    assert jnp.array_equal(y[0], jnp.zeros((8, 12)))
    assert jnp.any(y[1] != 0)
    finite = jnp.all(jnp.isfinite(y), (1, 2))
    assert jnp.all(finite), finite


@pytest.mark.parametrize("name, shape", [("jordan", (1, 64)), ("aol4", (64, 1))])
def test_a_vector_becomes_a_unit_vector_of_its_direction(name, shape):
    x = normal(*shape)
    y = orthogonalize(x, name).astype(F32)
    assert jnp.sum(x * y) / jnp.linalg.norm(x) / jnp.linalg.norm(y) > 0.999
    assert 0.67 < jnp.linalg.norm(y) < 1.21


def test_an_infinite_entry_gives_a_non_finite_result():
    x = normal(ROWS, COLUMNS).at[0, 0].set(jnp.inf)
    assert not any(jnp.all(jnp.isfinite(orthogonalize(x, form=form))) for form in FORMS)


def test_the_form_torch_rounds_the_norm_to_bf16_and_is_the_standard_form_in_float32():
    x = normal(2, 32, 48)
    torch_form = lambda x, dtype: orthogonalize(x, "jordan", "torch", dtype).astype(F32)
    assert distance(torch_form(x, F32), orthogonalize(x, "jordan", "standard", F32)) < 2e-6
    y = torch_form(x, BF16)
    # A power of two changes no mantissa. Another factor changes how the norm is rounded.
    assert jnp.array_equal(torch_form(8 * x, BF16), y)
    assert distance(torch_form(1.003 * x, BF16), y) > 5e-3
    assert jnp.array_equal(torch_form(0 * x, BF16), 0 * x)
    with pytest.raises(ValueError, match="form=torch needs .*'polar_express'"):
        NewtonSchulz("polar_express", form="torch")


@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (24, 48)])
def test_the_form_torch_gives_a_stack_on_a_mesh_the_results_of_one_device(shape):
    """On a mesh tall matrices are transposed before the iteration, and square ones are not."""
    x = normal(3, *shape)
    y = orthogonalize(x, "jordan", "torch", BF16)
    if shape[0] > shape[1]:
        turned = orthogonalize(x.mT, "jordan", "torch", BF16).mT
        assert jnp.array_equal(turned, y)
    each = jnp.stack([orthogonalize(matrix, "jordan", "torch", BF16) for matrix in x])
    assert distance(each, y) < 1e-2


def test_unknown_coefficients_or_form_and_zero_steps_are_errors():
    with pytest.raises(ValueError, match="--optim.ns_coefficients"):
        NewtonSchulz("euler")
    with pytest.raises(ValueError, match="--optim.ns_steps"):
        NewtonSchulz(steps=0)
    with pytest.raises(ValueError, match="auto, standard, gram, torch; got form='fast'"):
        NewtonSchulz(form="fast")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "shape, form",
    [((26, 2048, 5632), "standard"), ((26, 5632, 2048), "gram"), ((12, 768, 768), "standard")],
)
def test_temporaries_stay_below_one_and_a_half_stacks(shape, form, dtype):
    x = jax.ShapeDtypeStruct(shape, F32)
    memory = newton_schulz(form=form, dtype=dtype).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 4 * math.prod(shape)


def test_place_avoids_collectives_inside_the_loop():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    place = lambda x_XIO: jax.lax.with_sharding_constraint(x_XIO, split("x"))
    function = NewtonSchulz(place=place, chunk_bytes=0)
    x = jax.device_put(normal(8, 32, 48), split(None, "x"))
    program = jax.jit(function, out_shardings=split(None, "x")).lower(x).compile()
    assert program.as_text().count(" all-to-all(") == 2  # before and after the loop only
    assert not re.search(" all-(gather|reduce)", program.as_text())
    assert distance(program(x), orthogonalize(normal(8, 32, 48), dtype=F32)) < 2e-6


@pytest.mark.parametrize(("coefficients", "form"), [("jordan", "standard"), ("aol4", "gram")])
def test_the_symmetric_kernel_gives_the_same_result(coefficients, form):
    """Compares in float32, where the iteration's own rounding does not hide a wrong epilogue."""
    kernels = KernelsConfig(interpret=True)
    kernel = build_square(choose_routes(ModelConfig(), False, "cpu", False, kernels)["square"])
    x = normal(2, 48, 100)
    options = {"coefficients": coefficients, "form": form}
    fused, plain = newton_schulz(kernel=kernel, **options)(x), newton_schulz(**options)(x)
    assert jnp.linalg.norm(fused - plain) < 1e-4 * jnp.linalg.norm(plain)

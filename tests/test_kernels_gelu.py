"""Compares GELU's kernels with float64 references, interpreted on CPU.

JAX_PLATFORMS=cuda python -m pytest -m gpu runs them on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gelu import BACKWARD_PTX, FORWARD_PTX, Blocks, gelu, gelu_reference
from pallas_kernels.gelu_xla import gelu_xla
from pallas_kernels.tiles import BlockTiles
from tests.test_kernels_references import (
    FULL,
    HALF,
    INTERPRET,
    assert_reproducible,
    distance,
    draw,
    exact,
    with_gradients,
)

pytestmark = pytest.mark.gpu
# Small blocks: each program of the backward computes several.
TILES = {"gelu": BlockTiles(2, 1_024, 4), "gelu_backward": BlockTiles(2, 1_024, 4, 3)}
CASES = {  # shape of x
    "rows that end inside a block": (3, 7, 3_072),
    "the width of gpt_774m": (5, 5_120),
    "narrower blocks of more rows": (3, 6_400),
    "fewer columns than a block": (100, 96),
}


@pytest.fixture(autouse=True)
def float64_enabled():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [(name, *((FULL, 2e-6) if "narrow" in name else (HALF, 3e-3))) for name in CASES],
)
def test_gelu_and_its_gradients_equal_the_reference_and_are_reproducible(
    name, dtype, tolerance, biased
):
    shape = CASES[name]
    x, dy = (2 * draw(seed, shape, dtype) for seed in range(2))
    given = [x] + [draw(2, shape[-1:], FULL)] * biased
    fused = lambda x, bias=None: gelu(x, bias, TILES, INTERPRET)
    y, got = with_gradients(fused, given, dy)
    assert y.dtype == got[0].dtype == dtype
    assert_reproducible(fused, given, dy, got)
    reference = lambda x, bias=None: gelu_reference(x, bias)
    y_exact, want = with_gradients(reference, exact(*given), *exact(dy))
    assert distance(y, y_exact) < tolerance
    assert distance(got[0], want[0]) < tolerance
    if biased:  # the sum of the rounded gradients, in float32
        rows = tuple(range(len(shape) - 1))
        assert got[1].dtype == FULL
        assert distance(got[1], np.asarray(got[0], np.float64).sum(rows)) < 1e-6


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_each_number_is_near_float64_also_far_from_zero(biased):
    """Down to -5.5 GELU is 1e-7 of its input, and a tanh of float32 would leave no digit of it."""
    x = jnp.linspace(-5.5, 8, 2_048, dtype=FULL).reshape(2, 1_024)
    given = [x] + [jnp.full(1_024, 0.25, FULL)] * biased
    fused = lambda x, bias=None: gelu(x, bias, TILES, INTERPRET)
    y, (dx, *_) = with_gradients(fused, given, jnp.ones_like(x))
    u = np.asarray(x, np.float64) + 0.25 * biased
    exponent = np.sqrt(8 / np.pi) * (u + 0.044715 * u**3)
    sigmoid = 1 / (1 + np.exp(-exponent))
    np.testing.assert_allclose(y, u * sigmoid, rtol=1e-5, atol=1e-30)
    term = u * (1 - sigmoid) * np.sqrt(8 / np.pi) * (1 + 3 * 0.044715 * u * u)
    # The derivative has a root near -0.75, so its error is compared with its terms.
    assert (np.abs(dx - sigmoid * (1 + term)) <= 2e-5 * sigmoid * (1 + np.abs(term))).all()


def evaluate_ptx(assembly, *arguments):
    """Computes in float32 what a fragment of PTX writes to $0, given $1, $2, ..."""
    values = {f"${n}": np.float32(x) for n, x in enumerate(arguments, 1)}
    functions = {
        "mul": lambda a, b: a * b,
        "add": lambda a, b: a + b,
        "neg": lambda a: -a,
        "fma": lambda a, b, c: np.float32(np.float64(a) * b + c),
        "ex2": np.exp2,
        "rcp": np.reciprocal,
    }

    def read(operand):
        if not operand.startswith("0f"):
            return values[operand]
        return np.frombuffer(bytes.fromhex(operand[2:]), ">f4")[0]

    statements = assembly.strip("{} \n").split(";")[1:-1]  # the first declares registers
    with np.errstate(over="ignore"):
        for statement in statements:
            operation, target, *operands = statement.replace(",", " ").split()
            name = operation.partition(".")[0]
            values[target] = np.float32(functions[name](*map(read, operands)))
    return values["$0"]


def test_the_assembly_computes_what_the_interpreted_kernels_do():
    u, dy = np.linspace(-20, 20, 4_001, dtype=np.float32), np.float32(1.5)
    y, (dx,) = with_gradients(lambda x: gelu(x, None, TILES, True), [u[None]], dy * u[None] ** 0)
    np.testing.assert_allclose(evaluate_ptx(FORWARD_PTX, u), y[0], rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(evaluate_ptx(BACKWARD_PTX, u, dy), dx[0], rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_gives_what_xlas_gelu_gives():
    """The negative infinity gives NaN, as -inf * 0 does; a very large number gives itself or 0."""
    values = [np.nan, np.inf, -np.inf, 1e4, -1e4, 1e12, -1e12, -0.0]
    x = np.zeros((len(values) + 1, 8), np.float32)
    x[: len(values), 3] = values
    dy = np.ones_like(x)
    dy[-1, 5] = np.nan
    both = lambda function: jax.jit(
        lambda x, bias, dy: (lambda y, pullback: (y, *pullback(dy)))(*jax.vjp(function, x, bias))
    )
    for bias in (0.0, np.nan, np.inf, -np.inf):
        given = x, np.zeros(8, np.float32), dy
        given[1][6] = bias
        got = both(lambda x, bias: gelu(x, bias, TILES, INTERPRET))(*given)
        want = both(gelu_xla)(*given)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    plain = gelu(jnp.asarray(values, FULL)[None], None, TILES, INTERPRET)[0]
    want = [np.nan, np.inf, np.nan, 1e4, 0, 1e12, 0, 0]
    np.testing.assert_array_equal(plain, np.float32(want))


def test_many_rows_are_blocks_of_a_grid_of_one_dimension():
    """CUDA limits the other dimensions to 65,535 blocks."""
    assert Blocks((8 * 70_000, 2_048), BlockTiles(8, 1_024, 8)).grid == (2 * 70_000,)


def test_padding_adds_nothing_to_the_gradient_of_the_bias():
    """Blocks of 4 rows and 1,024 columns hold 3 x 96 elements; the rest reads as zeros."""
    x, dy, bias = draw(0, (3, 96), FULL), draw(1, (3, 96), FULL), 5 + draw(2, (96,), FULL)
    tiles = TILES | {"gelu_backward": BlockTiles(4, 1_024, 4, 1)}
    gradient = lambda tiles: jax.vjp(lambda b: gelu(x, b, tiles, INTERPRET), bias)[1](dy)[0]
    (wide,), (dy_wide,) = exact(x), exact(dy)
    (want,) = jax.vjp(lambda b: gelu_reference(wide, b), *exact(bias))[1](dy_wide)
    whole = TILES | {"gelu_backward": BlockTiles(1, 32, 4)}  # no block has padding
    for given in (tiles, whole):
        np.testing.assert_allclose(gradient(given), want, rtol=1e-5, atol=1e-6)

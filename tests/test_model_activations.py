"""The backward passes of norms and GELU that GPUs use, against float64 and JAX's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.model.dense import dense_plain
from jaxtrain.model.layer_parts import gelu
from pallas_kernels.gelu_xla import gelu_xla
from pallas_kernels.hlo import Program, shapes_of
from pallas_kernels.norm_xla import normalise, normalise_gpu

EPS = 1e-5


def differentiate(function, arguments, dy):
    """Returns function's result and its gradients, as float64 arrays."""

    @jax.jit  # faster than compiling every operation
    def run(arguments, dy):
        y, pullback = jax.vjp(function, *arguments)
        return y, *pullback(dy.astype(y.dtype))

    return [np.asarray(x, np.float64) for x in run(arguments, dy) if x is not None]


def distances(results, exact):
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(results, exact, strict=True)]


def in_float64(function, arguments, dy):
    with jax.enable_x64(True):
        wide = [None if x is None else jnp.asarray(x, jnp.float64) for x in arguments]
        return differentiate(function, wide, jnp.asarray(dy, jnp.float64))


@pytest.mark.parametrize(
    "form, width, gain, bias",
    [
        ("layer", (48,), True, True),
        ("layer", (48,), True, False),
        ("rms", (48,), True, False),
        ("rms", (6, 8), True, False),  # over all heads
        ("rms", (48,), False, False),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_and_gradients_are_as_near_to_float64_as_jax_own(form, width, gain, bias, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    x = (jax.random.normal(keys[0], (4, 64, *width)) * 3 + 1).astype(dtype)
    arguments = (
        x,
        1 + jax.random.normal(keys[1], width) / 4 if gain else None,
        jax.random.normal(keys[2], width) if bias else None,
    )
    dy = jax.random.normal(keys[3], x.shape).astype(dtype)
    fixed = form, tuple(range(-len(width), 0)), EPS
    plain = lambda *args: normalise(*args, *fixed)
    exact = in_float64(plain, arguments, dy)
    got = differentiate(lambda *args: normalise_gpu(*args, *fixed), arguments, dy)
    floor = 2 * float(jnp.finfo(jnp.float32).eps)
    for ours, jax_own in zip(
        distances(got, exact), distances(differentiate(plain, arguments, dy), exact), strict=True
    ):
        assert ours <= 1.1 * jax_own + floor


def test_gelu_for_gpus_is_nearer_to_float64_than_bfloat16_arithmetic():
    x = jnp.linspace(-8, 8, 4_096).astype(jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(0), x.shape).astype(jnp.bfloat16)
    bias = jnp.asarray([0.3])
    plain = lambda x, bias: gelu(x + bias)
    exact = in_float64(plain, (x[:, None], bias), dy[:, None])
    got = distances(differentiate(gelu_xla, (x[:, None], bias), dy[:, None]), exact)
    rounded = lambda x, bias: plain(x, bias.astype(x.dtype))
    bf16 = distances(differentiate(rounded, (x[:, None], bias), dy[:, None]), exact)
    assert max(got) < 2e-3  # one rounding to 8 bits
    assert all(ours < theirs for ours, theirs in zip(got, bf16, strict=True))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_non_finite_input_reaches_the_result_and_its_gradients(value):
    x = jnp.ones((3, 8)).at[1, 2].set(value)
    gain = jnp.ones(8)
    norm = lambda x, gain: normalise_gpu(x, gain, None, "rms", (-1,), EPS)
    y, dx, dgain = differentiate(norm, (x, gain), jnp.ones((3, 8)))
    assert not np.isfinite(y[1]).all() and np.isfinite(y[[0, 2]]).all()
    assert not np.isfinite(dx[1]).all() and not np.isfinite(dgain).all()
    y, dx = differentiate(gelu_xla, (x * jnp.nan,), jnp.ones((3, 8)))
    assert np.isnan(y).all() and np.isnan(dx).all()


@pytest.mark.parametrize("chip", ["a40", "h100"])
def test_no_activation_is_stored_in_float32(chip):
    """Compiles layer norms, products with biases and GELU, and their gradients, for a GPU."""
    pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is missing: offline")
    from jaxtrain.ops import tuning
    from pallas_kernels.chip import CHIPS
    from pallas_kernels.offline import compile_for

    N, D = 32_768, 768  # for fewer rows XLA counts on the cache
    struct = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    h, w = struct(jnp.bfloat16, 32, N // 32, D), struct(jnp.bfloat16, 2, D, D)
    vectors = struct(jnp.float32, 2, D)

    def network(h, w, gain, bias):
        for i in range(2):
            n = normalise_gpu(h, gain[i], bias[i], "layer", (-1,), EPS)
            h = h + gelu_xla(dense_plain(n, w[i]), bias[i])
        return h

    def step(h, w, gain, bias, dh):
        h, pullback = jax.vjp(network, h, w, gain, bias)
        return h, pullback(dh)

    # XLA's own products may spill, as no autotuner chooses their tiles here.
    options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": False}
    options |= tuning.compiler_options(chip)
    compiled, _ = compile_for(CHIPS[chip], step, h, w, vectors, vectors, h, **options)
    works = Program(compiled.as_text()).work()
    results = [shapes_of(re.sub(r"\{[^}]*\}", "", work.instruction.result)) for work in works]
    assert not [x for xs in results for x in xs if x[0] == "f32" and np.prod(x[1]) == N * D]
    # In sizes of h. An H100 moves 49 without normalise_gpu and 40 without gelu_xla; an A40 moves 39
    # without both.
    moved = sum(work.hbm_bytes for work in works if not work.flops) / (2 * N * D)
    assert moved < 37

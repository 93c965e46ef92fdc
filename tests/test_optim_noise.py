import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config.train_config import MeshConfig
from jaxtrain.distributed.mesh import build_mesh
from jaxtrain.optim.noise import heavy_tailed_noise, symmetric_lomax

GRADS = {"a": jnp.full((64, 8), 2.0), "b": {"c": jnp.linspace(-1.0, 1.0, 100)}}


@functools.cache
def compiled(scale):
    """Returns the compiled update, which is the same for every seed."""
    return jax.jit(heavy_tailed_noise(1.5, scale).update)


def noises(scale, steps, grads=GRADS, good=(), seed=0):
    """Returns (the noise of each step, the last state); `good` has a bool for each step."""
    state, added = heavy_tailed_noise(1.5, scale, seed).init(grads), []
    for i in range(steps):
        out, state = compiled(scale)(grads, state, good=good[i] if good else True)
        added.append(jax.tree.map(np.subtract, out, grads))
    return added, state


def same(tree, other):
    return all(jax.tree.leaves(jax.tree.map(jnp.array_equal, tree, other)))


@pytest.fixture(scope="module")
def draws():
    return np.sort(symmetric_lomax(jax.random.key(0), (400_000,), 1.5))


def test_noise_is_a_function_of_the_seed_and_the_step():
    first, _ = noises(0.5, 3, seed=3)
    again, _ = noises(0.5, 3, seed=3)
    other, _ = noises(0.5, 3, seed=4)
    assert same(first, again)
    assert not same(first[0], first[1]) and not same(first[0], other[0])


def test_leaves_of_one_shape_get_different_noise():
    grads = {"a": jnp.ones(50), "b": jnp.ones(50)}
    [added], _ = noises(0.5, 1, grads)
    assert not jnp.array_equal(added["a"], added["b"])


def test_seeds_share_one_compiled_program():
    text = [
        jax.jit(t.update).lower(GRADS, t.init(GRADS)).as_text()
        for t in (heavy_tailed_noise(1.5, 0.5, seed) for seed in (0, 1))
    ]
    assert text[0] == text[1]


def test_noise_is_symmetric(draws):
    assert abs((draws > 0).mean() - 0.5) < 0.003
    share = np.array([0.75, 0.9, 0.99, 0.999])
    above, below = np.quantile(draws, share), -np.quantile(draws, 1 - share)
    np.testing.assert_allclose(above, below, rtol=0.15)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 3.0])
def test_quantiles_follow_the_lomax_distribution_far_into_the_tail(alpha):
    sizes = np.abs(symmetric_lomax(jax.random.key(1), (400_000,), alpha))
    rest = np.array([0.5, 0.1, 0.01, 1e-3, 1e-4])  # share of draws beyond
    np.testing.assert_allclose(np.quantile(sizes, 1 - rest), rest ** (-1 / alpha) - 1, rtol=0.15)


def test_the_noise_is_scaled_by_the_first_gradient():
    update = compiled(0.5)
    _, state = update(GRADS, heavy_tailed_noise(1.5, 0.5).init(GRADS), good=True)
    assert float(state.rms["a"]) == 2.0
    tiny = jax.tree.map(lambda g: g * 1e-3, GRADS)
    (_, expected), _ = noises(0.5, 2)
    out, _ = update(tiny, state, good=True)
    added = jax.tree.map(np.subtract, out, tiny)
    np.testing.assert_allclose(added["a"], expected["a"], rtol=1e-4, atol=1e-5)


def test_the_noise_is_the_same_on_any_mesh():
    transform = heavy_tailed_noise(1.5, 0.5)
    mesh = build_mesh(MeshConfig(fsdp=8))
    split = jax.device_put(GRADS["a"], NamedSharding(mesh, P("fsdp")))
    outs = [jax.jit(transform.update)(g, transform.init(g))[0] for g in (GRADS["a"], split)]
    np.testing.assert_allclose(*outs, rtol=1e-6)


def test_twice_the_scale_is_twice_the_noise():
    grads = {"a": jnp.full(1_000, 1.0)}
    added = [noises(scale, 1, grads)[0][0]["a"] for scale in (0.5, 1.0)]
    np.testing.assert_allclose(2 * added[0], added[1], rtol=1e-4, atol=1e-5)


def test_a_scale_of_zero_is_the_identity_bitwise():
    transform = heavy_tailed_noise(1.5, 0.0)
    out, state = transform.update(GRADS, transform.init(GRADS), good=True)
    assert same(out, GRADS) and not jax.tree.leaves(state)


def test_a_bad_step_changes_neither_the_state_nor_later_noise():
    fresh = heavy_tailed_noise(1.5, 0.5).init(GRADS)
    nan = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    _, state = compiled(0.5)(nan, fresh, good=False)
    assert same(state, fresh)
    expected, _ = noises(0.5, 2)
    interrupted, _ = noises(0.5, 3, good=(True, False, True))
    assert same(expected[0], interrupted[0]) and same(expected[1], interrupted[2])


@pytest.mark.parametrize(
    ("alpha", "scale", "flag"), [(1.0, 1, "noise_tail"), (2, -1, "noise_scale")]
)
def test_noise_without_a_mean_or_with_a_negative_scale_is_an_error(alpha, scale, flag):
    with pytest.raises(ValueError, match=f"--optim.{flag}"):
        heavy_tailed_noise(alpha, scale)

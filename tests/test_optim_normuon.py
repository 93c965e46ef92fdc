import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.axes import Axes
from jaxtrain.optim.normuon import balance_neurons, normuon

AXES = Axes.parse("L|D->F")


def skewed(seed=0):
    """Returns [2,12,8] whose outputs differ in size by up to 100 times."""
    u = jax.random.normal(jax.random.key(seed), (2, 12, 8))
    return u * jnp.logspace(-1, 1, 8)


def test_the_first_step_gives_every_neuron_the_same_length_and_preserves_the_norm():
    transform, u = balance_neurons(AXES), skewed()
    y, _ = jax.jit(transform.update)(u, transform.init(u))
    lengths = jnp.sqrt(jnp.sum(y**2, -2))
    np.testing.assert_allclose(lengths, lengths.mean(-1, keepdims=True).repeat(8, -1), rtol=1e-5)
    norm = lambda x: np.sqrt(np.sum(np.square(x), (-2, -1)))
    np.testing.assert_allclose(norm(y), norm(u), rtol=1e-5)


def test_a_neuron_that_grows_is_divided_by_its_average():
    transform = balance_neurons(AXES, decay=0.9)
    u = jnp.ones((1, 4, 3))
    _, state = transform.update(u, transform.init(u))
    y, _ = transform.update(u.at[..., 0].mul(10), state)
    average = 0.9 * 0.1 + 0.1 * np.array([100.0, 1.0, 1.0])
    want = np.array([10.0, 1.0, 1.0]) / np.sqrt(average)
    np.testing.assert_allclose(y[0, 0] / y[0, 0, 1], want / want[1], rtol=1e-5)


def test_zeros_stay_zeros_and_the_state_has_one_number_per_output():
    transform, u = balance_neurons(AXES), jnp.zeros((2, 12, 8))
    y, state = transform.update(u, transform.init(u))
    assert not jnp.any(y)
    assert state.square.shape == (2, 1, 8)


def test_normuon_descends_a_quadratic():
    goal = skewed(1)
    optimizer, params = normuon(AXES, learning_rate=0.5, weight_decay=0.0), jnp.zeros_like(goal)
    state = optimizer.init(params)

    @jax.jit
    def advance(params, state):
        updates, state = optimizer.update(params - goal, state, params)
        return params + updates, state

    for _ in range(60):
        params, state = advance(params, state)
    assert jnp.linalg.norm(params - goal) < 0.5 * jnp.linalg.norm(goal)


def test_a_decay_out_of_range_names_its_flag():
    with pytest.raises(ValueError, match="--optim.neuron_decay"):
        balance_neurons(AXES, 1.0)

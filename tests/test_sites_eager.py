"""The eager step during a delay: its arithmetic, and that only the site's own weights know it."""

import functools

import jax
import numpy as np
import optax
import pytest
from sites_in_memory import Hub, Site, arrive_in_time, build, replace_batch, train_together

import runs
from jaxtrain.sites import BLOCK
from jaxtrain.sites.codec import CODECS
from jaxtrain.sites.decisions import Decision
from jaxtrain.sites.eager import eager_offset, eager_slope, eager_step
from jaxtrain.sites.outer import difference_from_mean, nesterov, outer_step
from jaxtrain.sites.rejoin import Return

RNG = np.random.default_rng(0)
NONE = np.empty(0, np.float32)
PERIOD, DELAY, STEPS, RATE, MU = 4, 2, 14, 0.7, 0.6


def vector(blocks=3):
    return RNG.normal(size=blocks * BLOCK).astype(np.float32)


def take_step(theta, reference, momentum, share, rate, mu):
    """Returns the weights after an eager step from theta."""
    slope = eager_slope(share, rate, mu)
    return theta + eager_step(eager_offset(reference, momentum, slope, mu), slope, theta)


def assert_close(x, y, atol=2e-6):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_the_eager_step_is_the_outer_step_along_this_sites_part_of_the_mean_change(mu):
    reference, theta = vector(200), vector(200)
    momentum = vector(200) if mu else NONE
    average = reference - 0.2 * (reference.astype(float) - theta)
    expected, _ = nesterov(reference, momentum, average, RATE, mu)
    assert_close(take_step(theta, reference, momentum, 0.2, RATE, mu), expected)


def test_the_eager_step_of_one_site_is_the_true_one_and_is_none_where_weights_are_averaged():
    codec, reference, momentum, theta = CODECS["float32"], vector(), vector(), vector()
    args = [codec.encode(theta)], [7], reference
    expected, _ = outer_step(codec, *args, momentum, RATE, MU)
    assert_close(take_step(theta, reference, momentum, 1.0, RATE, MU), expected)
    assert not eager_step(eager_offset(reference, NONE, 0.0, 0.0), 0.0, theta).any()
    assert eager_slope(1.0, 1.0, 0.0) == 0


@pytest.mark.parametrize(("eager", "blend"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_a_difference_between_two_sites_dies_out_where_training_reaches_the_optimum(eager, blend):
    """Training from weights e, most of it during the delay, ends at the optimum, 0: it adds -e."""
    codec, reference = CODECS["float32"], np.zeros(BLOCK, np.float32)
    starts, kept = [vector(1), vector(1)], [0, 0]
    for _ in range(24):
        thetas = [reference - e + x for e, x in zip(starts, kept, strict=True)]
        codes = [codec.encode(theta) for theta in thetas]
        kept = [blend * difference_from_mean(codec, codes, [1, 1], k, BLOCK) for k in range(2)]
        starts = [take_step(x, reference, NONE, 0.5, 1.0, 0.0) if eager else x for x in thetas]
        reference, _ = outer_step(codec, codes, [1, 1], reference, NONE, 1.0, 0.0)
    assert (np.abs(starts[0] - starts[1]).max() < 1e-3) == bool(eager or blend)
    assert np.abs(reference).max() < 1e-3


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text"))


def build_still(text):
    """Returns a run whose steps change nothing."""
    return build(text, optax.with_extra_args_support(optax.sgd(0.0)))


@functools.cache
def train_at_constant_speed(text, **values):
    """Returns site 0 and its weights after each step.

    Site k moves by (k + 1) / 64 a step wherever it is; site 1 has twice the tokens of site 0.
    """
    built, weights = build_still(text), {}

    def move(site, step):
        arrive_in_time(site, step)
        k = site.rounds.places.site
        if not k:
            weights[step - 1] = site.weights()
        params = jax.tree.map(lambda x: x + (k + 1) / 64, site.state.params)
        site.state = site.state._replace(params=params)

    hub, given = Hub(2), dict(period=PERIOD, delay=DELAY, rate=RATE, momentum=MU) | values
    both = [built, replace_batch(built, 16)]
    sites = [Site(both[k], hub, k, STEPS, **given) for k in range(2)]
    a, b = train_together(sites, before=move)
    assert (a.weights() == b.weights()).all()
    return a, weights


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_result_replaces_the_eager_step_and_outer_steps_stay_those_of_a_plain_delay(text, codec):
    """Weights that move alike wherever they are give the same codes, so the same results."""
    atol = 2e-6 if codec == "float32" else 1e-3
    late, late_weights = train_at_constant_speed(text, codec=codec)
    eager, weights = train_at_constant_speed(text, codec=codec, eager=True)
    for x, y in zip(late.rounds.outer, eager.rounds.outer, strict=True):
        assert_close(x.reference, y.reference, atol)
        assert_close(x.momentum, y.momentum, atol)
    own, momentum, share = PERIOD / 64, 0.0, 1 / 2
    for step in range(STEPS - 1):
        moved = weights[step] - late_weights[step]
        if step < PERIOD or step % PERIOD >= DELAY:
            assert_close(moved, 0, atol)
            continue
        expected = -own + (1 + MU) * RATE * share * own - MU * MU * momentum
        assert_close(moved, expected, atol)
        if step % PERIOD == DELAY - 1:  # the result comes next
            mean = (1 * own + 2 * 2 * own) / 3
            momentum, share = MU * momentum - RATE * mean, 1 / 3


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_site_keeps_a_share_of_its_difference_and_the_mean_stays(text, codec):
    atol = 2e-6 if codec == "float32" else 1e-3
    late, late_weights = train_at_constant_speed(text, codec=codec)
    blend, weights = train_at_constant_speed(text, codec=codec, blend=0.5)
    assert_close(late.rounds.outer[0].reference, blend.rounds.outer[0].reference, atol)
    own, apart, kept = PERIOD / 64, 0.0, 0.0
    for step in range(STEPS - 1):
        if step >= PERIOD and step % PERIOD == 0:  # site 1 moves twice as fast: 5 / 3 on average
            apart = own - 5 / 3 * own + kept
        elif step >= PERIOD and step % PERIOD == DELAY:
            kept = 0.5 * apart
        assert_close(weights[step] - late_weights[step], kept, atol)


def test_a_site_that_took_over_a_state_steps_from_there(text):
    built = build_still(text)
    values = dict(period=PERIOD, delay=DELAY, rate=RATE, momentum=MU, eager=True)
    hub = Hub(2)
    site = Site(built, hub, 1, STEPS, **values)
    with site.rounds as rounds, jax.set_mesh(site.run.mesh):
        [outer] = rounds.outer
        outer.plan_eager_step(rounds.cfg, 1.0)  # it was alone
        reference, u, theta = (vector(outer.reference.size // BLOCK) for _ in range(3))
        hub.put(0, ("state", 1), 0, 3, reference.tobytes() + u.tobytes())
        rounds.exchange.decisions = lambda fragment: {3: Decision((0,), (1,))}
        way = Return(rounds.cfg, rounds.places, rounds.exchange, rounds.outer)
        way.take_states(site.state, 8, 14, [3])
    step = eager_step(outer.offset, outer.slope, theta)
    assert_close(theta + step, take_step(theta, reference, u, 1 / 2, RATE, MU))

"""sites.blend: the share of its difference from the sites' mean that a site keeps."""

import functools

import jax
import numpy as np
import optax
import pytest
from sites_in_memory import Hub, Site, arrive_in_time, build, replace_batch, train_together

import runs
from jaxtrain.sites import BLOCK
from jaxtrain.sites.codec import CODECS
from jaxtrain.sites.outer import difference_from_mean, outer_step

PERIOD, DELAY, STEPS, RATE, MU = 4, 2, 14, 0.7, 0.6


@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_a_difference_between_two_sites_dies_out_where_training_reaches_the_optimum(blend):
    """Training from weights e, most of it during the delay, ends at the optimum, 0: it adds -e."""
    codec, reference = CODECS["float32"], np.zeros(BLOCK, np.float32)
    rng = np.random.default_rng(0)
    starts, kept = [rng.normal(size=BLOCK).astype(np.float32) for _ in range(2)], [0, 0]
    for _ in range(24):
        thetas = [reference - e + x for e, x in zip(starts, kept, strict=True)]
        codes = [codec.encode(theta) for theta in thetas]
        kept = [blend * difference_from_mean(codec, codes, [1, 1], k, BLOCK) for k in range(2)]
        reference, _ = outer_step(codec, codes, [1, 1], reference, reference[:0], 1.0, 0.0)
        starts = thetas
    assert (np.abs(starts[0] - starts[1]).max() < 1e-3) == bool(blend)
    assert np.abs(reference).max() < 1e-3


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A run whose steps change nothing."""
    text = runs.write_text(tmp_path_factory.mktemp("text"))
    return build(text, optax.with_extra_args_support(optax.sgd(0.0)))


def train_at_constant_speed(still, **values):
    """Returns site 0 and its weights after each step.

    Site k moves by (k + 1) / 64 a step wherever it is; site 1 has twice the tokens of site 0.
    """
    weights = {}

    def move(site, step):
        arrive_in_time(site, step)
        k = site.rounds.places.site
        if not k:
            weights[step - 1] = site.weights()
        params = jax.tree.map(lambda x: x + (k + 1) / 64, site.state.params)
        site.state = site.state._replace(params=params)

    hub, given = Hub(2), dict(period=PERIOD, delay=DELAY, rate=RATE, momentum=MU) | values
    both = [still, replace_batch(still, 16)]
    sites = [Site(both[k], hub, k, STEPS, **given) for k in range(2)]
    a, b = train_together(sites, before=move)
    assert (a.weights() == b.weights()).all()
    return a, weights


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_site_keeps_a_share_of_its_difference_and_the_mean_stays(still, codec):
    """Weights that move alike wherever they are give the same results with and without blend."""
    close = functools.partial(
        np.testing.assert_allclose, rtol=1e-5, atol=2e-6 if codec == "float32" else 1e-3
    )
    late, late_weights = train_at_constant_speed(still, codec=codec)
    blend, weights = train_at_constant_speed(still, codec=codec, blend=0.5)
    close(late.rounds.outer[0].reference, blend.rounds.outer[0].reference)
    own, apart, kept = PERIOD / 64, 0.0, 0.0
    for step in range(STEPS - 1):
        if step >= PERIOD and step % PERIOD == 0:  # site 1 moves twice as fast: 5 / 3 on average
            apart = own - 5 / 3 * own + kept
        elif step >= PERIOD and step % PERIOD == DELAY:
            kept = 0.5 * apart
        close(weights[step] - late_weights[step], kept)

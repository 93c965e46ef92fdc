import numpy as np
import pytest

from jaxtrain.data.shuffle import permute

SIZES = [10_000, 1_000_000, 4_000_000, 1_000_000_000]
INDICES = 300_000  # examined: a correlation of 0.03 is then 16 sigma (3 at n=10_000)


def images(n, seed=0, epoch=0):
    """Returns the images of consecutive indices, divided by n."""
    first = (n - min(n, INDICES)) // 3
    return permute(np.arange(first, first + min(n, INDICES)), n, seed, epoch) / n


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 99, 100, 101, 1000, 4097])
def test_every_index_appears_exactly_once(n):
    for seed in range(5):
        for epoch in range(3):
            assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_a_million_indices_appear_exactly_once():
    assert (np.sort(permute(np.arange(10**6), 10**6, 3, 1)) == np.arange(10**6)).all()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("lag", [1, 2, 7])
def test_images_of_neighbouring_indices_are_uncorrelated(n, lag):
    x = images(n, seed=lag)
    assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 0.03


@pytest.mark.parametrize("n", SIZES)
def test_means_of_32_images_spread_like_those_of_independent_draws(n):
    x = images(n)
    means = x[: len(x) // 32 * 32].reshape(-1, 32).mean(1)
    expected = (1 / 12 / 32) ** 0.5
    assert abs(means.std() / expected - 1) < 4 / (2 * len(means)) ** 0.5
    assert abs(means.mean() - 0.5) < 4 * expected / len(means) ** 0.5


@pytest.mark.parametrize("n", SIZES)
def test_images_are_uniform_over_the_range(n):
    counts = np.histogram(images(n), 100, (0, 1))[0]
    expected = counts.sum() / 100
    assert abs(counts - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize("n", SIZES)
def test_other_epochs_and_seeds_give_unrelated_permutations(n):
    x = images(n)
    for other in (images(n, epoch=1), images(n, seed=1)):
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.03
        assert np.mean(x == other) < 10 / n + 1e-3


def test_all_6_permutations_of_3_indices_occur():
    orders = {tuple(permute(np.arange(3), 3, seed, 0)) for seed in range(200)}
    assert len(orders) == 6


def test_an_index_has_the_same_image_in_any_set_of_indices():
    images_of_all = permute(np.arange(10_007), 10_007, 5, 2)
    few = np.array([10_006, 0, 77, 77])
    assert (permute(few, 10_007, 5, 2) == images_of_all[few]).all()


@pytest.mark.parametrize(("index", "n"), [([-1], 5), ([5], 5), ([0], 0), ([0], 2**63 - 1)])
def test_an_index_outside_the_range_is_refused(index, n):
    with pytest.raises(ValueError, match=f"n={n}"):
        permute(np.array(index), n, 0, 0)

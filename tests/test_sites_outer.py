import itertools
import zlib

import numpy as np
import pytest

from jaxtrain.sites import BLOCK
from jaxtrain.sites.checksum import combine_crc32
from jaxtrain.sites.codec import CODECS
from jaxtrain.sites.outer import difference_from_mean, nesterov, outer_step, weighted_mean

RNG = np.random.default_rng(0)
NONE = np.empty(0, np.float32)


def vector(blocks=3):
    return RNG.normal(size=blocks * BLOCK).astype(np.float32)


def test_one_site_at_rate_1_without_momentum_keeps_its_weights_bit_for_bit():
    """reference - (reference - theta) is not theta: it fails for most of these."""
    theta, reference = vector(200), vector(200)
    theta[:2] = -0.0, 1e-30
    assert (reference - (reference - theta) != theta).mean() > 0.3
    codec = CODECS["float32"]
    new, _ = outer_step(codec, [codec.encode(theta)], [17], reference, NONE, 1.0, 0.0)
    assert new.tobytes() == theta.tobytes()


@pytest.mark.parametrize("name", CODECS)
def test_the_outer_step_is_nesterov_on_the_mean_change(name):
    codec, reference, momentum, rate, mu = CODECS[name], vector(), vector(), 0.7, 0.6
    thetas, tokens = [vector(), vector()], [100, 300]
    sent = thetas if codec.lossless else [reference - theta for theta in thetas]
    codes = [codec.encode(x) for x in sent]
    new, new_momentum = outer_step(codec, codes, tokens, reference, momentum, rate, mu)
    decoded = [codec.decode(code, reference.size).astype(float) for code in codes]
    deltas = [reference - x for x in decoded] if codec.lossless else decoded
    mean = 0.25 * deltas[0] + 0.75 * deltas[1]
    expected_momentum = mu * momentum + rate * mean
    np.testing.assert_allclose(new_momentum, expected_momentum, rtol=1e-6, atol=1e-6)
    expected = reference - mu * expected_momentum - rate * mean
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-6)


def test_two_sites_with_the_same_weights_average_to_them():
    theta = vector()
    mean = weighted_mean([theta, theta, theta], [1, 1, 5])
    assert (mean.astype(np.float32) == theta).all()
    new, _ = nesterov(vector(), NONE, mean, 1.0, 0.0)
    assert (new == theta).all()


@pytest.mark.parametrize("name", ["float32", "int4"])
def test_the_sites_differences_from_their_mean_have_the_mean_0(name):
    codec, reference, tokens = CODECS[name], vector(200), [100, 300, 200]
    thetas = [vector(200) for _ in tokens]
    codes = [codec.encode(x if codec.lossless else reference - x) for x in thetas]
    apart = [difference_from_mean(codec, codes, tokens, k, reference.size) for k in range(3)]
    assert np.abs(weighted_mean(apart, tokens)).max() < 1e-6
    decoded = [codec.decode(code, reference.size) for code in codes]
    decoded = decoded if codec.lossless else [reference - x for x in decoded]
    expected = decoded[1] - weighted_mean(decoded, tokens)
    np.testing.assert_allclose(apart[1], expected, rtol=1e-5, atol=2e-6)


def test_parts_of_a_vector_give_the_same_step_as_the_whole():
    codec, reference, momentum, x = CODECS["int4"], vector(9), vector(9), vector(9)
    code, size = codec.encode(x), codec.code_bytes(BLOCK)
    whole = outer_step(codec, [code], [1], reference, momentum, 0.7, 0.6)
    for i in range(9):
        own, coded = slice(i * BLOCK, (i + 1) * BLOCK), slice(i * size, (i + 1) * size)
        part = outer_step(codec, [code[coded]], [1], reference[own], momentum[own], 0.7, 0.6)
        assert (part[0] == whole[0][own]).all() and (part[1] == whole[1][own]).all()


def test_the_checksum_of_parts_is_that_of_the_whole():
    data = RNG.bytes(100_001)
    for cuts in ([0, 100_001], [0, 1, 4096, 4096, 77_777, 100_001]):
        parts = [data[a:b] for a, b in itertools.pairwise(cuts)]
        assert combine_crc32((zlib.crc32(p), len(p)) for p in parts) == zlib.crc32(data)
    assert combine_crc32([]) == zlib.crc32(b"") == 0


def test_sizes_that_do_not_fit_are_refused():
    codec, x = CODECS["int4"], vector(2)
    code = codec.encode(x)
    with pytest.raises(ValueError, match="momentum must have 2048 elements; got 0"):
        outer_step(codec, [code], [1], x, NONE, 0.7, 0.6)
    with pytest.raises(ValueError, match=r"codes\[1\] must have .* elements; got"):
        outer_step(codec, [code, codec.encode(vector(3))], [1, 1], x, NONE, 0.7, 0.0)
    with pytest.raises(ValueError, match="blocks of 1024; got 5 elements"):
        outer_step(codec, [code], [1], x[:5], NONE, 0.7, 0.0)


@pytest.mark.parametrize("tokens", [[], [3], [3, 0], [3, -1]])
def test_a_mean_needs_tokens_of_each_site(tokens):
    with pytest.raises(ValueError, match=r"got 2 vectors and tokens \["):
        weighted_mean([vector(), vector()], tokens)

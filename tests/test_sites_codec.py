import numpy as np
import pytest

from jaxtrain.sites import BLOCK
from jaxtrain.sites.codec import CODECS, NonFiniteDelta

LOSSY = [name for name, codec in CODECS.items() if not codec.lossless]
# Mean squared error over that of zeros, for normally distributed values; about twice the measured.
ERROR = {"float32": 0, "bf16": 6e-6, "int8": 1e-4, "int4": 2.4e-2, "int2": 0.13}
BITS = {"float32": 32, "bf16": 16, "int8": 8.0625, "int4": 4.25, "int2": 2.125}


def normal(blocks, seed=0, scale=1e-3):
    return scale * np.random.default_rng(seed).normal(size=blocks * BLOCK).astype(np.float32)


def relative_error(codec, x):
    return float(np.mean((codec.decode(codec.encode(x), x.size) - x) ** 2) / np.mean(x**2))


@pytest.mark.parametrize("name", CODECS)
def test_a_code_has_the_promised_size_and_error(name):
    codec, x = CODECS[name], normal(300)
    assert codec.encode(x).size == codec.code_bytes(x.size) == x.size * BITS[name] / 8
    assert relative_error(codec, x) <= ERROR[name]


@pytest.mark.parametrize("name", CODECS)
def test_the_code_of_a_range_of_blocks_is_a_slice_of_the_whole_code(name):
    codec, x = CODECS[name], normal(131)  # more than one chunk
    code = codec.encode(x)
    part = slice(codec.code_bytes(5 * BLOCK), codec.code_bytes(130 * BLOCK))
    assert (codec.encode(x[5 * BLOCK : 130 * BLOCK]) == code[part]).all()
    decoded = codec.decode(code[part], 125 * BLOCK)
    assert (decoded == codec.decode(code, x.size)[5 * BLOCK : 130 * BLOCK]).all()
    assert codec.encode(x[:0]).size == codec.decode(code[:0], 0).size == 0


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1.0, 1e34])
def test_codes_neither_overflow_nor_divide_by_zero(name, scale):
    codec, x = CODECS[name], normal(2, scale=1) * np.float32(scale)
    x[:BLOCK] = 0
    with np.errstate(all="raise", under="ignore"):
        decoded = codec.decode(codec.encode(x), x.size)
    assert not decoded[:BLOCK].any() and np.isfinite(decoded).all()
    assert np.abs(decoded).max() <= 1.01 * np.abs(x).max()


@pytest.mark.parametrize("name", LOSSY)
def test_one_large_element_among_zeros_is_kept(name):
    """With a scale from the root mean square it would be cut to a fraction, round after round."""
    x = np.zeros(BLOCK, np.float32)
    x[77] = -3.0
    decoded = CODECS[name].decode(CODECS[name].encode(x), BLOCK)
    assert decoded[77] == pytest.approx(-3.0, rel=0.01) and np.count_nonzero(decoded) == 1


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e35])
def test_a_number_that_cannot_be_sent_is_refused_with_its_place(name, value):
    x = normal(200)
    x[150_001] = value
    with pytest.raises(NonFiniteDelta, match=r"must be finite; got .* in element 150001"):
        CODECS[name].encode(x)


def test_vectors_of_partial_blocks_and_codes_of_another_size_are_refused():
    codec = CODECS["int4"]
    with pytest.raises(ValueError, match="blocks of 1024; got 1025"):
        codec.encode(np.zeros(BLOCK + 1, np.float32))
    with pytest.raises(ValueError, match="must have 544 bytes; got 543"):
        codec.decode(np.zeros(543, np.uint8), BLOCK)


@pytest.mark.parametrize("name", LOSSY)
def test_with_error_feedback_the_mean_of_decoded_vectors_converges_to_the_true_mean(name):
    """Without it the bias of a constant vector never shrinks."""
    codec, x = CODECS[name], normal(2, scale=1)
    error, total, rounds = np.zeros_like(x), np.zeros(x.size), 200
    for _ in range(rounds):
        decoded = codec.decode(codec.encode(x + error), x.size)
        error, total = x + error - decoded, total + decoded
    fed = np.abs(total / rounds - x).max()
    plain = np.abs(codec.decode(codec.encode(x), x.size) - x).max()
    assert fed < plain / 10

"""The outer optimizer: Nesterov momentum on the mean of the sites' changes. Pure functions.

With weights theta_k of site k and the reference that all sites began the round with,

    average   = sum_k w_k * theta_k, or reference - sum_k w_k * decoded_k
    delta     = reference - average
    momentum  = mu * momentum + rate * delta
    reference = reference - mu * momentum - rate * delta

where decoded_k is what a code leaves of reference - theta_k. The last line is computed as
average + (1 - rate) * delta - mu * momentum: the same number, but at rate 1 and mu 0 it is average
itself, bit for bit, whereas reference - (reference - average) would be rounded. That is also why
the lossless code carries theta and not the difference.

Sums are taken in the order of the sites, in float64, and rounded to float32 once. Every site
computes the same bits, whatever the order in which codes arrive.

Source: DiLoCo, https://arxiv.org/abs/2311.08105; the form of the momentum is that of MuLoCo,
https://github.com/facebookresearch/MuLoCo, commit 475bbf4
"""

from collections.abc import Sequence

import numpy as np

from jaxtrain.sites import BLOCK
from jaxtrain.sites.codec import Codec

CHUNK = 128  # blocks computed at a time, so that float64 temporaries stay small


def weighted_mean(vectors: Sequence[np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """Returns sum_k tokens_k / sum(tokens) * vectors_k, in order: float32 [n] -> float64 [n].

    Raises:
        ValueError: there is no site, a site has no tokens, or numbers of vectors and tokens differ.
    """
    if len(vectors) != len(tokens) or not tokens or min(tokens) <= 0:
        raise ValueError(
            "a mean needs a positive number of tokens for each vector, and one vector or more; "
            f"got {len(vectors)} vectors and tokens {list(tokens)}."
        )
    total = sum(tokens)
    mean = vectors[0] * np.float64(tokens[0] / total)
    for vector, count in zip(vectors[1:], tokens[1:], strict=True):
        mean += vector * np.float64(count / total)
    return mean


def nesterov(
    reference: np.ndarray, momentum: np.ndarray, average: np.ndarray, rate: float, mu: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the new (reference, momentum), float32 [n].

    Args:
        reference, momentum: NumPy arrays, float32 [n]; momentum is empty if mu is 0.
        average: float64 [n], the weighted mean of the sites' weights.
        rate, mu: the outer rate and momentum.
    """
    delta = reference - average
    # A term with the factor 0 is left out: it would turn -0.0 into 0.0.
    new = average if rate == 1 else average + (1 - rate) * delta
    if mu:
        wide = mu * momentum.astype(np.float64) + rate * delta
        new, momentum = new - mu * wide, wide.astype(np.float32)
    return new.astype(np.float32), momentum


def outer_step(
    codec: Codec,
    codes: Sequence[np.ndarray],
    tokens: Sequence[int],
    reference: np.ndarray,
    momentum: np.ndarray,
    rate: float,
    mu: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a round's codes and returns the new (reference, momentum), float32 [n].

    Args:
        codes: of each participating site, in the order of the sites: codec.encode(theta) if
            codec.lossless, otherwise codec.encode(reference - theta), where theta is what the
            site's weights have become, float32 [n].
        tokens: that each of these sites has trained on.
        reference, momentum: NumPy arrays, float32 [n], n a multiple of BLOCK (1,024); a model's
            parameters side by side, padded with zeros. momentum is empty if mu is 0.

    Raises:
        ValueError: n is not a multiple of BLOCK, or momentum, codes or tokens do not fit it.
    """
    n = reference.size
    sizes = [("momentum", momentum.size, n if mu else 0)]
    sizes += [(f"codes[{i}]", code.size, codec.code_bytes(n)) for i, code in enumerate(codes)]
    for name, size, expected in sizes:
        if size != expected:
            raise ValueError(f"{name} must have {expected} elements; got {size}.")
    new_reference, new_momentum = np.empty_like(reference), np.empty_like(momentum)
    for start in range(0, reference.size, CHUNK * BLOCK):
        n = min(CHUNK * BLOCK, reference.size - start)
        part, coded = slice(start, start + n), slice(*map(codec.code_bytes, (start, start + n)))
        average = weighted_mean([codec.decode(code[coded], n) for code in codes], tokens)
        if not codec.lossless:
            average = reference[part] - average
        new = nesterov(reference[part], momentum[part], average, rate, mu)
        new_reference[part], new_momentum[part] = new
    return new_reference, new_momentum


def difference_from_mean(
    codec: Codec, codes: Sequence[np.ndarray], tokens: Sequence[int], site: int, n: int
) -> np.ndarray:
    """Returns the weights of one site minus the sites' weighted mean, float32 [n].

    Both are those that the codes stand for. So the weighted mean over all sites is 0.

    Args:
        codes, tokens: of each participating site, as in outer_step.
        site: index of the site among these.
    """
    difference = np.empty(n, np.float32)
    for start in range(0, n, CHUNK * BLOCK):
        size = min(CHUNK * BLOCK, n - start)
        coded = slice(codec.code_bytes(start), codec.code_bytes(start + size))
        decoded = [codec.decode(code[coded], size) for code in codes]
        apart = decoded[site] - weighted_mean(decoded, tokens)
        # A lossy code has reference - theta.
        difference[start : start + size] = apart if codec.lossless else -apart
    return difference


def encode_with_feedback(
    codec: Codec, x: np.ndarray, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the code of x and decay * (x - decoded code), what is to be added to the next vector.

    The latter is empty for a lossless code.
    """
    code = codec.encode(x)
    if codec.lossless:
        return code, x[:0]
    error = np.empty_like(x)
    for start in range(0, x.size, CHUNK * BLOCK):
        n = min(CHUNK * BLOCK, x.size - start)
        part, coded = slice(start, start + n), slice(*map(codec.code_bytes, (start, start + n)))
        error[part] = np.float32(decay) * (x[part] - codec.decode(code[coded], n))
    return code, error

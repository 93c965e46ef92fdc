"""Encodes the vectors that sites exchange: float32, bf16, int8, int4 and int2.

A vector is encoded block by block, and a block's code has the same number of bytes whatever its
content: the code of any range of blocks is a slice of the whole code. Decoding uses additions and
multiplications only, each rounded as IEEE 754 prescribes, so that every machine decodes the same
bits.

int8 and int4 divide each group of neighbours by the group's largest magnitude. int2 stores an
element's sign and one of two magnitudes, which are chosen for each group so that the squared error
is small (two iterations of Lloyd's algorithm). Both are biased; the sender adds what a code has
lost to the next vector (error feedback, `rounds.py`).

Sources: group-wise scales as in QLoRA, https://arxiv.org/abs/2305.14314; 2-bit codes and error
feedback in outer optimization, MuLoCo, https://arxiv.org/abs/2505.23725; Lloyd 1982,
https://doi.org/10.1109/TIT.1982.1056489
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxtrain.sites import BLOCK

CHUNK = 128  # blocks coded at a time, so that temporaries stay in the processor's cache
LARGEST = 1e35  # up to here no code overflows, nor does the sum over a group
SMALLEST_SCALE = 2.0**-120  # below it a scale's reciprocal would overflow
LLOYD_START = 1.23  # optimal threshold over the mean magnitude, for normally distributed values
BF16 = ml_dtypes.bfloat16


class NonFiniteDelta(ValueError):
    """A vector to send contains NaN, an infinity, or a number that a code cannot represent."""


@dataclass(frozen=True)
class Codec:
    """A code for vectors of whole blocks.

    Attributes:
        block_bytes: size of the code of BLOCK elements.
        encode_blocks: float32 [N,BLOCK] -> arrays [N,...] whose bytes, side by side, are the code.
        decode_blocks: uint8 [N,block_bytes] -> float32 [N,BLOCK].
        lossless: whether decoding returns the input, bit for bit.
    """

    block_bytes: int
    encode_blocks: Callable[[np.ndarray], list[np.ndarray]]
    decode_blocks: Callable[[np.ndarray], np.ndarray]
    lossless: bool = False

    def code_bytes(self, n: int) -> int:
        """Returns the exact size of the code of n elements, a multiple of BLOCK."""
        return _count_blocks(n) * self.block_bytes

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Returns the code of x: float32 [n] -> uint8 [code_bytes(n)], n a multiple of BLOCK.

        Raises:
            NonFiniteDelta: an element is not finite, or above 1e35 in magnitude.
        """
        x_NB = x.reshape(_count_blocks(x.size), BLOCK)
        code = np.empty((len(x_NB), self.block_bytes), np.uint8)
        for i in range(0, len(x_NB), CHUNK):
            chunk = x_NB[i : i + CHUNK]
            # NaN fails both comparisons.
            if not (chunk.max() <= LARGEST and chunk.min() >= -LARGEST):
                bad = i * BLOCK + int(np.argmax(~(np.abs(chunk.ravel()) <= LARGEST)))
                raise NonFiniteDelta(
                    f"a vector to send must be finite; got {x_NB.ravel()[bad]} in element {bad}."
                )
            start = 0
            for part in self.encode_blocks(chunk):
                part = part.view(np.uint8)
                code[i : i + CHUNK, start : start + part.shape[1]] = part
                start += part.shape[1]
        return code.reshape(-1)

    def decode(self, code: np.ndarray, n: int) -> np.ndarray:
        """Returns the vector of a code: uint8 [code_bytes(n)] -> float32 [n].

        Raises:
            ValueError: the code has another size.
        """
        if code.size != self.code_bytes(n):
            raise ValueError(
                f"the code of {n} elements must have {self.code_bytes(n)} bytes; got {code.size}."
            )
        code = code.reshape(-1, self.block_bytes)
        x_NB = np.empty((len(code), BLOCK), np.float32)
        for i in range(0, len(code), CHUNK):
            x_NB[i : i + CHUNK] = self.decode_blocks(code[i : i + CHUNK])
        return x_NB.reshape(-1)


def _count_blocks(n: int) -> int:
    if n % BLOCK:
        raise ValueError(f"a vector to send must consist of blocks of {BLOCK}; got {n} elements.")
    return n // BLOCK


def _split(code: np.ndarray, first_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits [N,bytes] into the first bytes of each block, as bfloat16, and the others."""
    first = np.ascontiguousarray(code[:, :first_bytes])
    return first.view(BF16).astype(np.float32), code[:, first_bytes:]


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs uint8 codes [N,BLOCK] into bytes; byte i has elements i, i + BLOCK*bits/8, ..."""
    parts = codes.reshape(len(codes), 8 // bits, -1)
    packed = parts[:, 0].copy()
    for i in range(1, 8 // bits):
        packed |= parts[:, i] << (bits * i)
    return packed


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Inverts _pack: uint8 [N,BLOCK*bits/8] -> uint8 [N,BLOCK]."""
    parts = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return np.concatenate(parts, axis=1)


def _round_up(x: np.ndarray) -> np.ndarray:
    """Rounds float32 x >= 0 up to bfloat16."""
    return ((x.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16).view(BF16)


def _uniform(bits: int, group: int) -> Codec:
    """Returns the code with integers of `bits` bits and a bfloat16 scale for each group."""
    top = 2 ** (bits - 1) - 1

    def encode(x_NB):
        x_NGE = x_NB.reshape(len(x_NB), -1, group)
        peaks_NG = np.maximum(x_NGE.max(-1), -x_NGE.min(-1))
        scales = _round_up((peaks_NG / np.float32(top)).astype(np.float32))
        wide = scales.astype(np.float32)
        inverse = np.where(wide < SMALLEST_SCALE, 0, 1 / np.maximum(wide, SMALLEST_SCALE))
        q = np.rint(x_NGE * inverse.astype(np.float32)[..., None]).astype(np.int8)
        q = q.reshape(x_NB.shape)
        return [scales, q if bits == 8 else _pack((q + 2 ** (bits - 1)).view(np.uint8), bits)]

    def decode(code):
        scales_NG, packed = _split(code, 2 * BLOCK // group)
        q = np.ascontiguousarray(packed).view(np.int8)
        if bits < 8:
            q = _unpack(packed, bits).view(np.int8) - np.int8(2 ** (bits - 1))
        x_NGE = q.astype(np.float32).reshape(len(code), -1, group)
        return (x_NGE * scales_NG[..., None]).reshape(len(code), BLOCK)

    return Codec(2 * BLOCK // group + BLOCK * bits // 8, encode, decode)


def _sign_and_magnitude(group: int) -> Codec:
    """Returns the 2-bit code: a sign, and whether the larger of a group's two magnitudes is meant.

    The group's magnitudes are stored in bfloat16, the smaller ones of a block first.
    """
    groups = BLOCK // group

    def encode(x_NB):
        a_NGE = np.abs(x_NB).reshape(len(x_NB), groups, group)
        total_NG = a_NGE.sum(-1)
        threshold_NG = total_NG * np.float32(LLOYD_START / group)
        for _ in range(2):
            large_NGE = a_NGE > threshold_NG[..., None]
            count_NG = np.count_nonzero(large_NGE, -1)
            large_sum_NG = np.einsum("nge,nge->ng", a_NGE, large_NGE)
            high_NG = large_sum_NG / np.maximum(count_NG, 1)
            # Rounding can leave a small negative sum where the magnitudes below are all zero.
            low_NG = np.maximum(total_NG - large_sum_NG, 0) / np.maximum(group - count_NG, 1)
            threshold_NG = ((low_NG + high_NG) / 2).astype(np.float32)
        high_NG = np.where(count_NG, high_NG, low_NG)  # a group of equal magnitudes
        magnitudes = np.concatenate([low_NG, high_NG], axis=1).astype(BF16)
        large_NB = (a_NGE > threshold_NG[..., None]).reshape(x_NB.shape)
        return [magnitudes, _pack(2 * large_NB.view(np.uint8) + np.signbit(x_NB), 2)]

    def decode(code):
        magnitudes, packed = _split(code, 4 * groups)
        low_NG1 = magnitudes[:, :groups, None].view(np.uint32)
        differing_NG1 = magnitudes[:, groups:, None].view(np.uint32) ^ low_NG1
        bits = _unpack(packed, 2).astype(np.uint32).reshape(len(code), groups, group)
        # Selects on the bits of the floats, which is 6 times faster than np.where.
        is_large = np.uint32(0) - (bits >> 1)  # all bits set, or none
        x_NGE = low_NG1 ^ (is_large & differing_NG1) ^ (bits << 31)
        return x_NGE.view(np.float32).reshape(len(code), BLOCK)

    return Codec(4 * groups + BLOCK // 4, encode, decode)


CODECS = {
    "float32": Codec(
        4 * BLOCK,
        lambda x: [x],
        lambda code: np.ascontiguousarray(code).view(np.float32),
        lossless=True,
    ),
    "bf16": Codec(
        2 * BLOCK,
        lambda x: [x.astype(BF16)],
        lambda code: np.ascontiguousarray(code).view(BF16).astype(np.float32),
    ),
    "int8": _uniform(8, group=256),
    "int4": _uniform(4, group=64),
    "int2": _sign_and_magnitude(group=256),
}

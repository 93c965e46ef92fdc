"""Combines the CRC-32 of parts: a vector's checksum must not depend on how it is divided.

Source: zlib 1.3, crc32.c, crc32_combine
"""

from collections.abc import Iterable

POLYNOMIAL = 0xEDB88320  # of CRC-32, the highest power in the lowest bit
ONE = 1 << 31  # the polynomial x^0


def combine_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """Returns zlib.crc32 of the concatenation of parts.

    Args:
        parts: (zlib.crc32, number of bytes) of each part.
    """
    crc = 0
    for part_crc, size in parts:
        crc = _multiply(_power_of_x(8 * size), crc) ^ part_crc
    return crc


def _power_of_x(n: int) -> int:
    """Returns x^n modulo the polynomial."""
    power, square = ONE, ONE >> 1
    while n:
        power = _multiply(power, square) if n & 1 else power
        square = _multiply(square, square)
        n >>= 1
    return power


def _multiply(a: int, b: int) -> int:
    """Returns a * b modulo the polynomial; coefficients are bits."""
    product = 0
    for i in range(32):
        if a >> (31 - i) & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product

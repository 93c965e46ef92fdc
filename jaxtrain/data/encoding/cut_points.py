"""Finds places where a text can be cut so that its tokens stay the same, if possible."""

import re

WINDOW_BYTES = 1 << 16  # searched for a newline to cut at
# No token of GPT-2's pattern spans the place between a printable character and a newline.
SAFE_CUT = re.compile(rb"[!-~]\n")


def find_cut(window: bytes) -> int:
    """Returns the offset of the first good cut in `window`, the bytes after the wanted place.

    If the window has no newline after a printable character, the cut is before the first character
    that begins in the window, so that no UTF-8 character is divided.
    """
    if match := SAFE_CUT.search(window):
        return match.start() + 1
    continuation_bytes = 0
    while continuation_bytes < len(window) and window[continuation_bytes] & 0xC0 == 0x80:
        continuation_bytes += 1
    return continuation_bytes


def find_cut_near_end(tail: bytes, wanted: int) -> int:
    """Returns the offset in a text's tail at which a cut leaves about `wanted` bytes.

    The cut is at a newline if one is near, otherwise between two characters. It is 0 or len(tail)
    if there are too few characters to cut.
    """
    position = max(0, len(tail) - wanted)
    cut = position + find_cut(tail[position : position + WINDOW_BYTES])
    if 0 < cut < len(tail) and len(tail) - cut >= wanted / 2:
        return cut
    before = max(0, len(tail) - 2 * wanted)
    if matches := list(SAFE_CUT.finditer(tail[before:position])):
        return before + matches[-1].start() + 1
    while position and tail[position] & 0xC0 == 0x80:
        position -= 1
    return position

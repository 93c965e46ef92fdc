"""Where a text may be cut, so that its parts have the tokens of the whole."""

import re

WINDOW_BYTES = 1 << 16  # searched for a newline to cut at


def cut_in_window(window: bytes) -> int:
    """Returns where a text may be cut inside the window that follows a wanted place.

    Between a printable character and a newline, where no token of GPT-2's pattern reaches across;
    if there is none near, before the first character that begins in the window.
    """
    if match := re.search(rb"[!-~]\n", window):
        return match.start() + 1
    continuations = 0
    while continuations < len(window) and window[continuations] & 0xC0 == 0x80:
        continuations += 1
    return continuations


def cut_near_end(tail: bytes, wanted: int) -> int:
    """Returns where to cut a text, or its last bytes, so that about `wanted` bytes follow.

    At a newline if one is near, else between two characters; 0 or all where it has too few.
    """
    position = max(0, len(tail) - wanted)
    cut = position + cut_in_window(tail[position : position + WINDOW_BYTES])
    if 0 < cut < len(tail) and len(tail) - cut >= wanted / 2:
        return cut
    before = max(0, len(tail) - 2 * wanted)
    if matches := list(re.finditer(rb"[!-~]\n", tail[before:position])):
        return before + matches[-1].start() + 1
    while position and tail[position] & 0xC0 == 0x80:
        position -= 1
    return position

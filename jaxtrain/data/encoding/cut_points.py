"""Finds places where a text can be cut so that its tokens stay the same.

A tokenizer.json may treat the beginning and the end of a text in its own way (it puts a space
before the first word, or strips spaces), and any text around a cut may decide about the tokens
next to it. Therefore each piece of a text is encoded with some of the text around it, and then
only the tokens of the piece itself are used.

That is right if the tokens at the cut do not depend on text further away. To check this, the text
around a cut is encoded twice: with much text before and little after the cut, and the other way
round. Where both give the same tokens, neither what is missing before nor what is missing after
decides about them. A cut is made only in the middle of such equal tokens; otherwise the piece
becomes longer.

This does not notice a token that depends on text far before and far after it at the same time. Nor
does it notice all ties of a Unigram model, which adds up the scores of the tokens of a word: if two
ways to divide a word longer than CONTEXT are equally likely, the rounding of the sum decides.
"""

import bisect
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from absl import logging

from jaxtrain.data.tokenizer import Spans, Tokenizer

WINDOW_BYTES = 1 << 16  # searched for a place to cut
CONTEXT = 512  # characters around a piece that are encoded with it
# Further characters in the longer of the two encodings. In a text that repeats itself, both could
# go wrong in the same way if this was a multiple of the repeated part, so it is a prime number.
FAR = 1_021
CONTEXT_BYTES = 4 * (CONTEXT + FAR)  # read before and after a place that may be a cut
EQUAL = 128  # tokens are compared up to so many characters from a cut, and half as many must agree
STEP = 512  # characters from one place that is tried to the next
MAX_PIECES = 8  # a piece becomes at most this many times as long, to bound the memory
SAFE_CUT = re.compile(rb"[!-~]\n")
# Where no token of a tokenizer spans the place before a match, whatever the text around it is:
# before any character; and, by GPT-2's pattern, between a printable character and a newline.
SAFE_CUTS = {
    "bytes": re.compile(rb"(?=[^\x80-\xbf])"),
    "gpt2": re.compile(rb"(?<=[!-~])(?=\n)"),
}


class Part(NamedTuple):
    """A piece of a text, in bytes, and how much of the text around it is encoded with it."""

    start: int
    stop: int
    before: int
    after: int


class _Cut(NamedTuple):
    place: int  # in the text, in bytes
    before: int  # bytes before it that the piece after it needs
    after: int  # bytes after it that the piece before it needs


def cut_text(
    read: Callable[[int, int], bytes],
    start: int,
    stop: int,
    piece_bytes: int,
    tokenizer: Tokenizer,
    where: str,
) -> Iterator[Part]:
    """Yields the pieces of a text, each of about piece_bytes. Logs a warning if one is longer.

    Args:
        read: returns bytes start:stop of what contains the text.
        start: where the text begins.
        where: names the text in warnings.
    """
    left, longer, unsure = _Cut(start, 0, 0), [], []
    while left.place < stop:
        right, wanted = _Cut(stop, 0, 0), left.place + piece_bytes
        while wanted < stop:
            cut = _find_cut_in(read, start, stop, wanted, tokenizer)
            if cut and left.place < cut.place < stop:
                right = cut
                break
            if wanted - left.place >= MAX_PIECES * piece_bytes:
                ahead = read(wanted, min(wanted + 4, stop))
                right = _Cut(wanted + find_cut(ahead), 0, 0)
                unsure.append(right.place)
                break
            wanted += piece_bytes
        if right.place - left.place >= 2 * piece_bytes:
            longer.append(left.place)
        yield Part(left.place, right.place, left.before, right.after)
        left = right
    if longer:
        logging.warning(
            "%s: the text has too few places to cut it, so %d piece(s) of it are encoded that are "
            "longer than %d bytes, the first from byte %d on",
            *(where, len(longer), 2 * piece_bytes, longer[0]),
        )
    if unsure:
        logging.warning(
            "%s: the text is cut at %d place(s), first at byte %d, where its tokens depend on text "
            "further away; some tokens there may differ from those of the whole text",
            *(where, len(unsure), unsure[0]),
        )


def _find_cut_in(
    read: Callable[[int, int], bytes], start: int, stop: int, wanted: int, tokenizer: Tokenizer
) -> _Cut | None:
    """Returns the first cut from byte `wanted` of a text on, or None if none is near."""
    end = min(wanted + WINDOW_BYTES, stop)
    safe_cut = SAFE_CUTS.get(tokenizer.name)
    if safe_cut and (match := safe_cut.search(read(wanted - 1, end), 1)):
        return _Cut(wanted - 1 + match.start(), 0, 0)
    first = max(start, wanted - CONTEXT_BYTES)
    data = read(first, min(end + CONTEXT_BYTES, stop))
    skipped = 0 if first == start else find_cut(data[:4], newline=False)
    try:
        text = _decode_whole_characters(data[skipped:])
        place = len(_decode_whole_characters(data[skipped : wanted - first]))
        last = len(_decode_whole_characters(data[skipped : end - first]))
        for middle in range(place, last, STEP):
            if (at := _find_equal_tokens(text, middle, tokenizer)) is not None:
                sizes = (
                    text[:at],
                    text[max(0, middle - CONTEXT) : at],
                    text[at : middle + CONTEXT],
                )
                whole, before, after = (len(part.encode()) for part in sizes)
                return _Cut(first + skipped + whole, before, after)
    except ValueError:  # not UTF-8, or refused by the tokenizer: reported when it is encoded
        return None
    return None


def _decode_whole_characters(data: bytes) -> str:
    """Decodes UTF-8 without the last character if its end is missing."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise
        return data[: error.start].decode()


def _find_equal_tokens(text: str, middle: int, tokenizer: Tokenizer) -> int | None:
    """Returns a place near `middle` where both encodings have the same tokens on both sides."""
    near = max(0, middle - CONTEXT), min(len(text), middle + CONTEXT)
    left = _Boundaries(text, max(0, near[0] - FAR), near[1], tokenizer)
    right = _Boundaries(text, near[0], min(len(text), near[1] + FAR), tokenizer)
    places = sorted(
        place
        for place in left.index.keys() & right.index.keys()
        if middle - EQUAL <= place <= middle + EQUAL
    )
    half = EQUAL // 2
    if len(places) < 3 or places[0] > middle - half or places[-1] < middle + half:
        return None
    if not left.is_equal(right, places[0], places[-1]):
        return None
    return min(places[1:-1], key=lambda place: abs(place - middle))


class _Boundaries:
    """The tokens of text[start:stop], and the places where one ends before the next begins."""

    def __init__(self, text: str, start: int, stop: int, tokenizer: Tokenizer):
        self.ids, spans = tokenizer.encode_with_spans(text[start:stop])
        self.spans = start + np.array([spans(i) for i in range(len(self.ids))]).reshape(-1, 2)
        firsts = np.minimum.accumulate(self.spans[::-1, 0])[::-1]
        ends = np.maximum.accumulate(self.spans[:, 1])
        is_boundary = np.append(True, firsts[1:] >= ends[:-1])[: len(firsts)]
        self.index: dict[int, int] = {}  # place -> the first token from there on
        for i in np.flatnonzero(is_boundary)[::-1]:  # the first of tokens for no character stays
            self.index[int(firsts[i])] = int(i)

    def is_equal(self, other: "_Boundaries", start: int, stop: int) -> bool:
        """Returns whether both have the same tokens between two places."""
        a, b = (slice(x.index[start], x.index[stop]) for x in (self, other))
        return np.array_equal(self.ids[a], other.ids[b]) and np.array_equal(
            self.spans[a], other.spans[b]
        )


def first_token_from(spans: Spans, tokens: int, place: int) -> int | None:
    """Returns the first token of a text from a character on; None if a token spans the place.

    Args:
        spans: of the tokens, see Tokenizer.encode_with_spans.
        tokens: how many there are.
    """
    first = bisect.bisect_left(range(tokens), place, key=lambda i: spans(i)[0])
    before = range(max(0, first - 4), first)  # several tokens may stand for one character
    return None if any(spans(i)[1] > place for i in before) else first


def find_cut(window: bytes, newline: bool = True) -> int:
    """Returns the offset of the first good cut in `window`, the bytes after the wanted place.

    If the window has no newline after a printable character, the cut is before the first character
    that begins in the window, so that no UTF-8 character is divided.

    Args:
        newline: whether to look for one.
    """
    if newline and (match := SAFE_CUT.search(window)):
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

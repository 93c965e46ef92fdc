"""Checks during encoding that the tokens spell the text, so that no text is lost unnoticed."""

import numpy as np

from jaxtrain.data.tokenizer import Tokenizer

WINDOW = 64  # tokens, or characters of a text that the tokenizer rewrites
LONG = 4_096  # tokens; a longer document is checked in three windows
EDGE = 16  # bytes that may differ at the end of an excerpt that is rewritten without its context
LOST = "bytes unknown to the tokenizer"
MAX_LOST = 0.01  # share of the text's bytes


class UnusableInput(ValueError):
    """The input cannot be encoded. Progress is deleted, because a retry would fail too."""


class ContainsEot(ValueError):
    """The tokens of a document contain the token that starts documents."""


def count_lost_bytes(tokenizer: Tokenizer, text: str, ids: np.ndarray, where: str) -> int:
    """Returns how many bytes of a document its tokens do not stand for.

    For speed, the bytes of all tokens are summed and only some tokens are spelled and compared
    with the document. If that finds a difference, the whole document is compared.

    Args:
        where: names the document in the error.

    Raises:
        ContainsEot: a token is the one that starts documents.
        UnusableInput: the tokens spell another text, a longer one or, with a lossless tokenizer, a
            shorter one.
    """
    if (ids == tokenizer.eot).any():
        raise ContainsEot(
            f"{where}: a text must not contain the token that starts documents, {tokenizer.eot}; "
            f"got it at token {int(np.argmax(ids == tokenizer.eot))}, by {tokenizer.name}."
        )
    seems_equal = _ends_match if tokenizer.rewrites else _windows_match
    may_lose = tokenizer.drops or (tokenizer.unknown >= 0 and (ids == tokenizer.unknown).any())
    if not may_lose and seems_equal(tokenizer, text, ids):
        return 0
    expected, spelled = tokenizer.expect(text), tokenizer.spell(ids)
    text_bytes = _bytes_without_space(text)
    remaining = _bytes_without_space(expected.decode(errors="ignore"))
    if 2 * remaining < text_bytes:  # a normalizer removes most of the text
        return text_bytes - remaining
    missing = len(expected) - len(spelled)
    if not tokenizer.lossless and missing > 0:
        return missing
    if spelled == expected or (tokenizer.approximate and -missing <= max(16, len(expected) // 100)):
        return 0
    same = _common_prefix_length(expected, spelled)
    raise UnusableInput(
        f"{where}: the tokens must spell the text; {tokenizer.name} gives {len(ids):,} tokens of "
        f"{len(spelled):,} bytes for {len(expected):,} bytes, and they differ at byte {same:,}: "
        f"{expected[same : same + 24]!r} became {spelled[same : same + 24]!r}."
    )


def check_lost_share(lost: int, text_bytes: int, tokenizer_name: str) -> None:
    """Raises UnusableInput if more than MAX_LOST of a corpus is unknown to its tokenizer."""
    if lost > MAX_LOST * text_bytes:
        raise UnusableInput(
            f"at most {MAX_LOST:.0%} of the text may be unknown to the tokenizer; got "
            f"{lost:,} of {text_bytes:,} bytes ({lost / text_bytes:.1%}) with {tokenizer_name}. "
            "Use a tokenizer whose vocabulary contains all bytes, such as gpt2."
        )


def _bytes_without_space(text: str) -> int:
    return len("".join(text.split()).encode())


def _windows_match(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> bool:
    """Returns whether the tokens have the text's length and samples of them spell its parts.

    The samples are the first, middle and last WINDOW tokens of a long document, or WINDOW tokens of
    a short one, at a place that depends on its length.
    """
    expected = text.encode()
    if tokenizer.name == "bytes":  # comparing everything is faster
        return tokenizer.spell(ids) == expected
    sizes = tokenizer.token_bytes[ids]
    if sizes.sum() != len(expected):  # NumPy sums int32 in int64
        return False
    last = max(len(ids) - WINDOW, 0)
    windows = (0, last // 2, last) if len(ids) > LONG else (len(text) * 7_919 % (last + 1),)
    for first in windows:
        start = int(sizes[:first].sum())
        spelled = tokenizer.spell(ids[first : first + WINDOW])
        if expected[start : start + len(spelled)] != spelled:
            return False
    return True


def _ends_match(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> bool:
    """Returns whether the tokens have about the rewritten text's length and spell its ends."""
    size = int(tokenizer.token_bytes[ids].sum())
    if not size < 2 * len(text.encode()) < 4 * size:
        return False
    if len(text) < WINDOW:
        return tokenizer.expect(text) == tokenizer.spell(ids)
    start, end = tokenizer.expect(text[:WINDOW])[:-EDGE], tokenizer.expect(text[-WINDOW:])[EDGE:]
    covering = 2 * WINDOW  # tokens: most stand for more than half a character
    first, last = tokenizer.spell(ids[:covering]), tokenizer.spell(ids[-covering:])
    return first.startswith(start) and last.endswith(end)


def _common_prefix_length(a: bytes, b: bytes) -> int:
    length = min(len(a), len(b))
    differs = np.frombuffer(a[:length], np.uint8) != np.frombuffer(b[:length], np.uint8)
    return int(np.argmax(differs)) if differs.any() else length

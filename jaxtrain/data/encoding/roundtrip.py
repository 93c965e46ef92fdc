"""Proof, while text is encoded, that the tokens stand for all of it."""

import numpy as np

WINDOW = 64  # tokens, or characters of a text that is rewritten first
LONG = 4_096  # tokens
EDGE = 16  # bytes that may differ where a text is cut before it is rewritten
LOST = "bytes unknown to the tokenizer"
MOST_LOST = 0.01  # share of the text's bytes


class Refused(ValueError):
    """An error after which an encoding does not go on from where it stopped."""


class HoldsStart(ValueError):
    """A document whose tokens hold the token that starts documents."""


def check_covers(tokenizer, text: str, ids: np.ndarray, where: str) -> int:
    """Returns how many bytes of a document its tokens do not stand for.

    The bytes of all tokens are summed, and what they spell is compared with the document in a few
    places. Where that does not settle it, the whole document is compared.

    Args:
        where: names the document in the error.

    Raises:
        HoldsStart: a token is the one that starts documents.
        Refused: the tokens spell something else, more, or, with a lossless tokenizer, less.
    """
    if (ids == tokenizer.eot).any():
        raise HoldsStart(
            f"{where}: a text must not hold the token that starts documents, {tokenizer.eot}; got "
            f"it at token {int(np.argmax(ids == tokenizer.eot))}, by {tokenizer.name}."
        )
    matches = _ends_match if tokenizer.rewrites else _windows_match
    loses = tokenizer.drops or (tokenizer.unknown >= 0 and (ids == tokenizer.unknown).any())
    if not loses and matches(tokenizer, text, ids):
        return 0
    expected, spelled = tokenizer.expect(text), tokenizer.spell(ids)
    text_bytes = _bytes_without_space(text)
    left = _bytes_without_space(expected.decode(errors="ignore"))
    if 2 * left < text_bytes:  # a normalizer that removes most of the text
        return text_bytes - left
    missing = len(expected) - len(spelled)
    if not tokenizer.lossless and missing > 0:
        return missing
    if spelled == expected or (tokenizer.approximate and -missing <= max(16, len(expected) // 100)):
        return 0
    same = _first_difference(expected, spelled)
    raise Refused(
        f"{where}: the tokens must spell the text; {tokenizer.name} gives {len(ids):,} tokens of "
        f"{len(spelled):,} bytes for {len(expected):,} bytes, and they differ at byte {same:,}: "
        f"{expected[same : same + 24]!r} became {spelled[same : same + 24]!r}."
    )


def _bytes_without_space(text: str) -> int:
    return len("".join(text.split()).encode())


def check_lost(lost: int, text_bytes: int, tokenizer_name: str) -> None:
    """Raises Refused where more than MOST_LOST of a corpus is unknown to its tokenizer."""
    if lost > MOST_LOST * text_bytes:
        raise Refused(
            f"at most {MOST_LOST:.0%} of the text may be unknown to the tokenizer; got "
            f"{lost:,} of {text_bytes:,} bytes ({lost / text_bytes:.1%}) with {tokenizer_name}. "
            "Take a tokenizer with bytes in its vocabulary, such as gpt2."
        )


def _windows_match(tokenizer, text, ids) -> bool:
    """Whether the sizes of all tokens, and the bytes of some, are those of the text.

    A short document is compared in one place, drawn by its length.
    """
    expected = text.encode()
    if tokenizer.name == "bytes":  # comparing all of it is faster
        return tokenizer.spell(ids) == expected
    sizes = tokenizer.token_bytes[ids]
    if sizes.sum() != len(expected):  # NumPy sums int32 in int64
        return False
    last = max(len(ids) - WINDOW, 0)
    places = (0, last // 2, last) if len(ids) > LONG else (len(text) * 7_919 % (last + 1),)
    for first in places:
        at = int(sizes[:first].sum())
        spelled = tokenizer.spell(ids[first : first + WINDOW])
        if expected[at : at + len(spelled)] != spelled:
            return False
    return True


def _ends_match(tokenizer, text, ids) -> bool:
    """Whether a text that is rewritten first has its tokens' ends and about their bytes."""
    size = int(tokenizer.token_bytes[ids].sum())
    if not size < 2 * len(text.encode()) < 4 * size:
        return False
    if len(text) < WINDOW:
        return tokenizer.expect(text) == tokenizer.spell(ids)
    start, end = tokenizer.expect(text[:WINDOW])[:-EDGE], tokenizer.expect(text[-WINDOW:])[EDGE:]
    some = 2 * WINDOW  # tokens, mostly of more than half a character each
    return tokenizer.spell(ids[:some]).startswith(start) and tokenizer.spell(ids[-some:]).endswith(
        end
    )


def _first_difference(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    differs = np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8)
    return int(np.argmax(differs)) if differs.any() else length

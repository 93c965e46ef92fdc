"""Proof, while text is encoded, that the tokens stand for all of it."""

import numpy as np

WINDOW = 256  # tokens compared at the start, the middle and the end of a document
LOST = "bytes unknown to the tokenizer"
MOST_LOST = 0.01  # share of the text's bytes


def check_covers(tokenizer, text: str, ids: np.ndarray, where: str) -> int:
    """Returns how many bytes of a document its tokens do not stand for.

    The bytes of all tokens are counted. What they spell is compared with the document in three
    windows; in whole where the tokenizer can lose text.

    Args:
        where: names the document in the error.

    Raises:
        ValueError: the tokens spell something else, more, or, with a lossless tokenizer, less.
    """
    if np.any(ids == tokenizer.eot):
        raise ValueError(
            f"{where}: a text must not hold the token that starts documents, {tokenizer.eot}; got "
            f"it at token {int(np.argmax(ids == tokenizer.eot))}, by {tokenizer.name}."
        )
    expected = tokenizer.expect(text)
    if tokenizer.lossless and _windows_match(tokenizer, expected, ids):
        return 0
    spelled = tokenizer.spell(ids.tolist())
    missing = len(expected) - len(spelled)
    if not tokenizer.lossless and missing > 0:
        return missing
    if spelled == expected or (tokenizer.approximate and -missing <= max(16, len(expected) // 100)):
        return 0
    same = _first_difference(expected, spelled)
    raise ValueError(
        f"{where}: the tokens must spell the text; {tokenizer.name} gives {len(ids):,} tokens of "
        f"{len(spelled):,} bytes for {len(expected):,} bytes, and they differ at byte {same:,}: "
        f"{expected[same : same + 24]!r} became {spelled[same : same + 24]!r}."
    )


def check_lost(lost: int, text_bytes: int, tokenizer_name: str) -> None:
    """Raises ValueError where more than MOST_LOST of a corpus is unknown to its tokenizer."""
    if lost > MOST_LOST * text_bytes:
        raise ValueError(
            f"at most {MOST_LOST:.0%} of the text may be unknown to the tokenizer; got "
            f"{lost:,} of {text_bytes:,} bytes ({lost / text_bytes:.1%}) with {tokenizer_name}. "
            "Take a tokenizer with bytes in its vocabulary, such as gpt2."
        )


def _windows_match(tokenizer, expected, ids) -> bool:
    ends = np.cumsum(tokenizer.token_bytes[ids], dtype=np.int64)
    if (int(ends[-1]) if len(ids) else 0) != len(expected):
        return False
    for first in sorted({0, max(len(ids) // 2 - WINDOW // 2, 0), max(len(ids) - WINDOW, 0)}):
        window = ids[first : first + WINDOW]
        at = int(ends[first - 1]) if first else 0
        spelled = tokenizer.spell(window.tolist())
        if expected[at : at + len(spelled)] != spelled:
            return False
    return True


def _first_difference(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    differs = np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8)
    return int(np.argmax(differs)) if differs.any() else length

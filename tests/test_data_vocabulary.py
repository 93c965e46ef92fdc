import shlex

import pytest

import runs
from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.data.vocabulary import check_vocabulary
from jaxtrain.errors import REFUSED


@pytest.mark.parametrize(
    ("tokenizer", "V"),
    [("bytes", 256), ("bytes", 512), ("gpt2", 50_257), ("gpt2", 50_304), ("gpt2", 65_536)],
)
def test_a_models_vocabulary_may_be_padded(tokenizer, V):
    check_vocabulary(DataConfig(tokenizer=tokenizer), build_tokenizer(tokenizer), V, False)


@pytest.mark.parametrize(
    ("tokenizer", "V", "fitting"),
    [
        ("bytes", 50_304, "gpt2"),
        ("bytes", 49_152, "tokenizer.json"),
        ("gpt2", 151_936, "tokenizer.json"),
        ("bytes", 2_048, "tokenizer.json"),
    ],
)
def test_a_tokenizer_far_smaller_than_the_model_is_refused(tokenizer, V, fitting):
    cfg, built = DataConfig(tokenizer=tokenizer, text="my books"), build_tokenizer(tokenizer)
    with pytest.raises(ValueError) as error:
        check_vocabulary(cfg, built, V, False)
    line, make, use = str(error.value).split("\n")
    assert f"got model.V={V} and data.tokenizer={tokenizer} of {built.vocab_size} entries" in line
    assert f"--data.tokenizer={fitting}" in line and "--model.V" in line
    words = ["encode", "--input=my books", "--out=shards", f"--tokenizer={fitting}"]
    assert shlex.split(make)[-4:] == words
    assert "--data.shards=shards" in use
    check_vocabulary(cfg, built, V, True)  # its text is already encoded


def test_a_tokenizer_that_does_not_fit_is_refused_before_the_text_is_encoded(tmp_path):
    cfg = DataConfig(text=str(runs.write_text(tmp_path)))
    with pytest.raises(ValueError, match="must fit the model's vocabulary"):
        open_corpus(cfg, "train", 50_304, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gpt2_config_without_a_corpus_is_refused_with_two_commands(tmp_path):
    flags = ["--config=configs/gpt_124m.py", f"--config.workdir={tmp_path / 'run'}"]
    line, make, use = runs.finish(runs.fork_command("train", *flags), REFUSED).strip().split("\n")
    assert "model.V=50304 and data.tokenizer=gpt2; got neither" in line
    assert shlex.split(make)[-4:] == ["encode", "--input=PATH", "--out=shards", "--tokenizer=gpt2"]
    assert shlex.split(use)[-4:] == ["jaxtrain.train", *flags, "--data.shards=shards"]
    assert not (tmp_path / "run").exists()

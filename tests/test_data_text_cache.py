"""data.text is encoded once below the run's folder, and again if it changes or is damaged."""

import json
from pathlib import Path

import pytest
from data_samples import encode_source, open_shards, write_modules

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus

pytestmark = pytest.mark.usefixtures("shard_cache")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"text {i}\n" * 99)
    return folder


def test_text_is_encoded_once_and_again_if_it_or_the_tokenizer_changes(tmp_path):
    texts = write_modules(tmp_path / "texts")

    def corpus(split="train", **options):
        cfg = DataConfig(text=str(texts), val_fraction=0.1, **options)
        vocab_size = 50_304 if cfg.tokenizer == "gpt2" else 256
        return open_corpus(cfg, split, vocab_size, tmp_path / "run")

    first = corpus()
    written = Path(first.shards[0].path).stat().st_mtime_ns
    assert corpus() == first and Path(first.shards[0].path).stat().st_mtime_ns == written
    assert corpus(tokenizer="gpt2").fingerprint != first.fingerprint
    assert corpus() == first
    (texts / "abc.py").write_text("changed = True\n")
    assert corpus().fingerprint != first.fingerprint
    assert corpus("val").tokens / (corpus().tokens + corpus("val").tokens) < 0.12


def test_a_run_inside_its_text_folder_does_not_train_on_its_own_output(texts):
    cfg = DataConfig(text=str(texts))
    first = open_corpus(cfg, "train", 256, texts / "runs" / "a")
    assert open_corpus(cfg, "train", 256, texts / "runs" / "a") == first


METADATA_DAMAGES = {
    "empty": lambda meta: "",
    "truncated": lambda meta: "{",
    "a list": lambda meta: "[]",
    "keys missing": lambda meta: '{"shards": []}',
    "shards are numbers": lambda meta: json.dumps(meta | {"shards": [3]}),
    "tokenizer is a number": lambda meta: json.dumps(meta | {"tokenizer": 5}),
    "eot is a string": lambda meta: json.dumps(meta | {"eot": "0"}),
    "skipped has no count": lambda meta: json.dumps(meta | {"skipped": {"empty": None}}),
    "file is a number": lambda meta: json.dumps(
        meta | {"shards": [meta["shards"][0] | {"file": 1}]}
    ),
    "tokens are missing": lambda meta: json.dumps(
        meta | {"shards": [meta["shards"][0] | {"tokens": None}]}
    ),
}


@pytest.mark.parametrize("kind", METADATA_DAMAGES)
def test_damaged_metadata_is_an_error_in_the_users_shards_and_rebuilt_in_a_run(
    kind, texts, tmp_path
):
    encode_source(texts, tmp_path / "out")
    cfg = DataConfig(text=str(texts))
    first = open_corpus(cfg, "train", 256, tmp_path / "run")
    for path in (tmp_path / "out" / "meta.json", Path(first.shards[0].path).parent / "meta.json"):
        path.write_text(METADATA_DAMAGES[kind](json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"out/meta\.json: expected"):
        open_shards(tmp_path / "out")
    assert open_corpus(cfg, "train", 256, tmp_path / "run") == first


SHARD_DAMAGES = {
    "a byte flipped": lambda path, content: path.write_bytes(
        content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    ),
    "cut": lambda path, content: path.write_bytes(content[:-100]),
    "empty": lambda path, content: path.write_bytes(b""),
    "missing": lambda path, content: path.unlink(),
}


@pytest.mark.parametrize("kind", SHARD_DAMAGES)
def test_a_damaged_shard_of_a_run_is_encoded_again_with_a_warning(kind, texts, tmp_path, caplog):
    cfg = DataConfig(text=str(texts))
    first = open_corpus(cfg, "train", 256, tmp_path / "run")
    path = Path(first.shards[0].path)
    content = path.read_bytes()
    SHARD_DAMAGES[kind](path, content)
    assert open_corpus(cfg, "train", 256, tmp_path / "run") == first
    assert path.read_bytes() == content
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(path) in warning and "encoded again" in warning
    SHARD_DAMAGES[kind](path, content)
    with pytest.raises(ValueError, match=r"text_train_000000\.bin|must contain a train shard"):
        open_shards(path.parent)

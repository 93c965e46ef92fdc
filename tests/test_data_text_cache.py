"""What is damaged in an encoding: named in one of the user's, made again in one of a run."""

import json
from pathlib import Path

import pytest
from data_samples import run

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"text {i}\n" * 999)
    return folder


def opened(source):
    return open_corpus(DataConfig(shards=str(source)), "train", 65_536, "unused")


DAMAGES = {
    "nothing": lambda meta: "",
    "half": lambda meta: "{",
    "a list": lambda meta: "[]",
    "few keys": lambda meta: '{"shards": []}',
    "shards": lambda meta: json.dumps(meta | {"shards": [3]}),
    "tokenizer": lambda meta: json.dumps(meta | {"tokenizer": 5}),
    "eot": lambda meta: json.dumps(meta | {"eot": "0"}),
    "skipped": lambda meta: json.dumps(meta | {"skipped": {"empty": None}}),
    "file": lambda meta: json.dumps(meta | {"shards": [meta["shards"][0] | {"file": 1}]}),
    "tokens": lambda meta: json.dumps(meta | {"shards": [meta["shards"][0] | {"tokens": None}]}),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_meta_is_named_and_that_of_a_run_is_made_again(kind, texts, tmp_path):
    run(texts, tmp_path / "out", val_fraction=0.1)
    cfg = DataConfig(text=str(texts))
    first = open_corpus(cfg, "train", 256, tmp_path / "run")
    for path in (tmp_path / "out" / "meta.json", Path(first.shards[0].path).parent / "meta.json"):
        path.write_text(DAMAGES[kind](json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"out/meta\.json: expected"):
        opened(tmp_path / "out")
    assert open_corpus(cfg, "train", 256, tmp_path / "run") == first


SHARD_DAMAGES = {
    "a byte": lambda path, content: path.write_bytes(
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
    with pytest.raises(ValueError, match=r"text_train_000000\.bin|must hold a train shard"):
        opened(path.parent)

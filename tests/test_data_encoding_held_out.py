"""Both splits hold text wherever there are two documents, or one that can be cut."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.pipeline import encode


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_rows(path, texts):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(source, out, fraction, **knobs):
    return encode(
        list_files(str(source), exclude=out), out, "bytes", val_fraction=fraction, **knobs
    )


def documents_of(out, split):
    paths = sorted(out.glob(f"*_{split}_*.bin"))
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])
    return tokens.astype(np.uint8).tobytes().decode().split("\0")[1:]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("count", [2, 3, 5, 60])
@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.05, 0.5])
def test_of_two_documents_or_more_one_is_held_out_and_one_trains(suffix, count, fraction, tmp_path):
    texts = [f"document {i}" for i in range(count)]
    source = write_rows(tmp_path / f"rows.{suffix}", texts)
    meta = run(source, tmp_path / "a", fraction)
    run(source, tmp_path / "b", fraction, piece_bytes=20)
    split = [documents_of(tmp_path / "a", s) for s in ("train", "val")]
    assert split[0] and split[1] and sorted(split[0] + split[1]) == sorted(texts)
    assert meta["documents"] == {"train": len(split[0]), "val": len(split[1])}
    for path in tmp_path.glob("a/*.bin"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_bad_documents_count_for_no_split(tmp_path):
    source = tmp_path / "rows.jsonl"
    write_rows(source, ["", "a", "b", "c"])
    source.write_text(source.read_text() + "bad\n")
    meta = run(source, tmp_path / "out", 0.001)
    assert meta["documents"] == {"train": 2, "val": 1}
    assert meta["skipped"] == {"empty": 1, "not JSON": 1}


@pytest.mark.parametrize("name", ["one.jsonl", "one.parquet", "one.txt"])
@pytest.mark.parametrize(
    "text", ["a sentence of some length\n" * 40, "no newline " * 20, "ab", "éé"]
)
def test_a_single_document_is_cut_near_its_end(name, text, tmp_path):
    source = tmp_path / name
    source.write_text(text) if name == "one.txt" else write_rows(source, [text])
    run(source, tmp_path / "out", 0.1)
    [train], [val] = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == text and train and val
    assert len(val) <= max(1, len(text) / 4)


@pytest.mark.parametrize("texts", [["a"], ["a", ""]])
def test_a_text_too_short_to_be_cut_is_refused_in_words(texts, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", texts)
    with pytest.raises(ValueError, match="must hold two documents.*got 1.*--data.text"):
        run(source, tmp_path / "out", 0.1)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="must hold two documents"):
        run(tmp_path / "a.txt", tmp_path / "out", 0.1)


def test_of_texts_of_one_character_one_is_held_out(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / name).write_text(name)
    assert run(tmp_path / "in", tmp_path / "out", 0.1)["documents"] == {"train": 2, "val": 1}


def test_training_on_sixty_json_lines_has_held_out_text(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [f"document {i} " * 800 for i in range(60)])
    for fraction in (0.01, 0.05):
        cfg = DataConfig(text=str(source), val_fraction=fraction)
        assert open_corpus(cfg, "val", 256, tmp_path / "run").tokens > 5_000


def test_shards_without_held_out_text_are_refused_with_what_to_do(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", ["a", "b"])
    run(source, tmp_path / "out", 0.0)
    assert open_corpus(DataConfig(shards=str(tmp_path / "out")), "train", 256, tmp_path).tokens == 4
    with pytest.raises(ValueError, match="must hold a val shard.*encode.*--val_fraction"):
        open_corpus(DataConfig(shards=str(tmp_path / "out")), "val", 256, tmp_path)
    cfg = DataConfig(text=str(source), val_fraction=0.0)
    with pytest.raises(ValueError, match=r"document for val.*--data\.val_fraction=0\.05"):
        open_corpus(cfg, "val", 256, tmp_path / "run")


@pytest.mark.parametrize("name", ["val", "my-validation", "test", "dev"])
def test_shards_of_an_input_that_is_named_like_a_split_keep_their_split(name, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [f"document {i}" for i in range(50)])
    run(source, tmp_path / "out", 0.1, name=name)
    for split in ("train", "val"):
        corpus = open_corpus(DataConfig(shards=str(tmp_path / "out")), split, 256, tmp_path)
        assert corpus.tokens == sum(len(d) + 1 for d in documents_of(tmp_path / "out", split))

"""Both splits get text if there are two documents, or one that can be cut."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import contents, documents_of, encode_source, open_shards

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus

pytestmark = pytest.mark.usefixtures("shard_cache")


def write_rows(path, texts):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("count", [2, 3, 5, 60])
@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.05, 0.5])
def test_each_split_gets_at_least_one_of_two_or_more_documents(suffix, count, fraction, tmp_path):
    texts = [f"document {i}" for i in range(count)]
    source = write_rows(tmp_path / f"rows.{suffix}", texts)
    meta = encode_source(source, tmp_path / "a", val_fraction=fraction)
    encode_source(source, tmp_path / "b", val_fraction=fraction, piece_bytes=20)
    train, val = (documents_of(tmp_path / "a", split) for split in ("train", "val"))
    assert train and val and sorted(train + val) == sorted(texts)
    assert meta["documents"] == {"train": len(train), "val": len(val)}
    assert contents(tmp_path / "a", "*.bin") == contents(tmp_path / "b", "*.bin")


def test_bad_documents_belong_to_no_split(tmp_path):
    source = tmp_path / "rows.jsonl"
    write_rows(source, ["", "a", "b", "c"])
    source.write_text(source.read_text() + "bad\n")
    meta = encode_source(source, tmp_path / "out", val_fraction=0.001)
    assert meta["documents"] == {"train": 2, "val": 1}
    assert meta["skipped"] == {"empty": 1, "not JSON": 1}


@pytest.mark.parametrize("name", ["one.jsonl", "one.parquet", "one.txt"])
@pytest.mark.parametrize(
    "text", ["a sentence of some length\n" * 40, "no newline " * 20, "ab", "éé"]
)
def test_a_single_document_is_cut_near_its_end(name, text, tmp_path):
    source = tmp_path / name
    source.write_text(text) if name == "one.txt" else write_rows(source, [text])
    encode_source(source, tmp_path / "out", val_fraction=0.1)
    [train], [val] = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == text and train and val
    assert len(val) <= max(1, len(text) / 4)


@pytest.mark.parametrize("texts", [["a"], ["a", ""]])
def test_a_single_text_that_is_too_short_to_be_cut_is_refused(texts, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", texts)
    with pytest.raises(ValueError, match="must contain two documents.*got 1.*--data.text"):
        encode_source(source, tmp_path / "out", val_fraction=0.1)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="must contain two documents"):
        encode_source(tmp_path / "a.txt", tmp_path / "out", val_fraction=0.1)


def test_one_of_several_texts_of_one_character_is_held_out(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / name).write_text(name)
    meta = encode_source(tmp_path / "in", tmp_path / "out")
    assert meta["documents"] == {"train": 2, "val": 1}


def test_training_on_sixty_json_lines_has_a_validation_corpus(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [f"document {i} " * 800 for i in range(60)])
    for fraction in (0.01, 0.05):
        cfg = DataConfig(text=str(source), val_fraction=fraction)
        assert open_corpus(cfg, "val", 256, tmp_path / "run").tokens > 5_000


def test_the_errors_for_missing_validation_text_say_what_to_do(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", ["a", "b"])
    encode_source(source, tmp_path / "out", val_fraction=0.0)
    assert open_shards(tmp_path / "out").tokens == 4
    with pytest.raises(ValueError, match="must contain a val shard.*encode.*--val_fraction"):
        open_shards(tmp_path / "out", "val")
    cfg = DataConfig(text=str(source), val_fraction=0.0)
    with pytest.raises(ValueError, match=r"document for val.*--data\.val_fraction=0\.05"):
        open_corpus(cfg, "val", 256, tmp_path / "run")


@pytest.mark.parametrize("name", ["val", "my-validation", "test", "dev"])
def test_a_name_that_starts_like_a_split_does_not_change_the_split_of_its_shards(name, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [f"document {i}" for i in range(50)])
    encode_source(source, tmp_path / "out", val_fraction=0.1, name=name)
    for split in ("train", "val"):
        corpus = open_shards(tmp_path / "out", split)
        assert corpus.tokens == sum(len(d) + 1 for d in documents_of(tmp_path / "out", split))

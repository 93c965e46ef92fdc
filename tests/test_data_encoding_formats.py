"""Every format of text that is read: gzip, zstd, JSON, CSV, parquet, Arrow."""

import gzip
import os

import pytest
from data_samples import DOCUMENTS, SAMPLES, documents_of, run, write, zstd

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encode import main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_format_gives_its_documents_whatever_the_size_of_the_pieces(kind, tmp_path):
    source = write(tmp_path / kind)
    for piece_bytes in (1 << 20, 600):
        meta = run(source, tmp_path / str(piece_bytes), piece_bytes=piece_bytes)
        split = {s: documents_of(tmp_path / str(piece_bytes), s) for s in ("train", "val")}
        assert sorted(split["train"] + split["val"]) == sorted(DOCUMENTS)
        assert meta["documents"] == {s: len(split[s]) for s in split} and not meta["skipped"]
        assert 5 <= len(split["val"]) <= 40
    shards = [(tmp_path / size / "text_val_000000.bin").read_bytes() for size in ("600", "1048576")]
    assert shards[0] == shards[1]


def test_a_compressed_text_is_the_text(tmp_path):
    text = "".join(DOCUMENTS).encode()
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text, mtime=0))
    (tmp_path / "a.zst").write_bytes(zstd(text, frames=3))
    for name in ("plain", "a.txt.gz", "a.zst"):
        run(tmp_path / name, tmp_path / "out" / name, piece_bytes=5_000)
    for split in ("train", "val"):
        file = f"text_{split}_000000.bin"
        found = {
            (tmp_path / "out" / name / file).read_bytes() for name in os.listdir(tmp_path / "out")
        }
        assert len(found) == 1


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_the_byte_order_mark_of_a_text_is_no_part_of_it(fraction, tmp_path):
    text = "".join(DOCUMENTS).encode()
    marked = b"\xef\xbb\xbf" + text
    (tmp_path / "a.txt").write_bytes(marked)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(marked, mtime=0))
    for name in ("a.txt", "a.txt.gz"):
        out = tmp_path / "out" / name
        meta = run(tmp_path / name, out, val_fraction=fraction, piece_bytes=5_000)
        found = documents_of(out, "train") + (documents_of(out, "val") if fraction else [])
        assert "".join(found).encode() == text and not meta["skipped"]


def test_a_folder_may_mix_formats_and_workers_do_not_change_the_result(tmp_path):
    for name in ("rows.jsonl", "rows.jsonl.zst", "table.csv", "table.parquet", "stream.arrow"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write(tmp_path / "in" / name)
    (tmp_path / "in" / "book.txt").write_text("".join(DOCUMENTS))
    for workers in (1, 2):
        meta = run(tmp_path / "in", tmp_path / str(workers), workers=workers, piece_bytes=3_000)
    assert sum(meta["documents"].values()) == 5 * len(DOCUMENTS) + 2  # the text is cut
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_training_reads_every_format_and_names_its_own_flag(tmp_path):
    source = write(tmp_path / "table.parquet")
    cfg = DataConfig(text=str(source), val_fraction=0.1)
    train, val = (open_corpus(cfg, split, 256, tmp_path / "run") for split in ("train", "val"))
    assert train.tokens + val.tokens == sum(len(d.encode()) + 1 for d in DOCUMENTS)
    with pytest.raises(ValueError, match=r"'id', 'text';.*--data\.text_field"):
        open_corpus(DataConfig(text=str(source), text_field="body"), "train", 256, tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "table.csv", "table.parquet", "file.arrow"]
)
def test_a_missing_column_lists_those_that_exist_and_names_the_flag(name, tmp_path, capsys):
    source = write(tmp_path / name)
    command = ["--input", str(source), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--workers", "1", "--text_field", "content"])
    message = str(stop.value.code)
    assert name in message and "'id', 'text'" in message and "data.text" not in message
    assert message.endswith("Set --text_field to the one that holds the text.")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04" + bytes(99), "zip archives"),
        (b"\xfd7zXZ\x00" + bytes(99), "compressed by xz"),
        (gzip.compress(b"a" * 257 + b"ustar" + bytes(99), mtime=0), "tar archives"),
        (gzip.compress(b"PAR1" + bytes(99), mtime=0), "tables compressed by gzip"),
        (gzip.compress(b"", mtime=0), "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (gzip.compress(b"\xef\xbb\xbf", mtime=0), "empty"),
        ("some words".encode("utf-16"), "UTF-16 text"),
        (gzip.compress(b"\xfe\xff" + "words".encode("utf-16-be"), mtime=0), "UTF-16 text"),
        (gzip.compress("é".encode("latin-1"), mtime=0), "not UTF-8"),
    ],
)
def test_files_of_other_formats_are_skipped_by_the_name_of_their_format(content, reason, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "other").write_bytes(content)
    with pytest.raises(ValueError, match=f"at least one document.*1 {reason}"):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "book.txt").write_text("".join(DOCUMENTS))
    assert run(tmp_path / "in", tmp_path / "out")["skipped"] == {reason: 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.md", "[link](x) and more\n"),
        ("a.py", "{1, 2}\nx = [{}]\n"),
        ("ini", "[section]\nkey=1\n"),
        ("a.txt", '{"text": "an object" that is none\n'),
        ("a.txt", "id,text\n1,x\n"),
        ("todo.md", "[ ] buy bread\n[1] a footnote\n"),
        ("a.txt", '{\n "text": "x"\n} and more\n'),
    ],
)
def test_text_that_only_begins_like_json_is_text(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    run(tmp_path / name, tmp_path / "out", val_fraction=0.0)
    assert documents_of(tmp_path / "out", "train") == [content]

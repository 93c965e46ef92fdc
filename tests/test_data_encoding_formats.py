"""Every input format gives the same documents; other files are skipped."""

import gzip

import pytest
from data_samples import (
    DOCUMENTS,
    SAMPLES,
    all_documents_of,
    contents,
    documents_of,
    encode_source,
    write_sample,
    zstd,
)

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encode import main

pytestmark = pytest.mark.usefixtures("shard_cache")


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_format_gives_the_same_documents_for_any_piece_size(kind, tmp_path):
    source = write_sample(tmp_path / kind)
    for piece_bytes in (1 << 20, 600):
        meta = encode_source(source, tmp_path / str(piece_bytes), piece_bytes=piece_bytes)
        assert all_documents_of(tmp_path / str(piece_bytes)) == sorted(DOCUMENTS)
        held_out = len(documents_of(tmp_path / str(piece_bytes), "val"))
        assert meta["documents"] == {"train": 200 - held_out, "val": held_out}
        assert 5 <= held_out <= 40 and not meta["skipped"]
    assert contents(tmp_path / "600", "*.bin") == contents(tmp_path / "1048576", "*.bin")


def test_a_compressed_text_gives_the_tokens_of_the_text(tmp_path):
    text = "".join(DOCUMENTS).encode()
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text, mtime=0))
    (tmp_path / "a.zst").write_bytes(zstd(text, frames=3))
    for name in ("plain", "a.txt.gz", "a.zst"):
        encode_source(tmp_path / name, tmp_path / "out" / name, piece_bytes=5_000)
    plain, gzipped, zstandard = (contents(f, "*.bin") for f in (tmp_path / "out").iterdir())
    assert plain == gzipped == zstandard


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_byte_order_mark_is_not_part_of_the_text(fraction, tmp_path):
    text = "".join(DOCUMENTS).encode()
    marked = b"\xef\xbb\xbf" + text
    (tmp_path / "a.txt").write_bytes(marked)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(marked, mtime=0))
    for name in ("a.txt", "a.txt.gz"):
        out = tmp_path / "out" / name
        meta = encode_source(tmp_path / name, out, val_fraction=fraction, piece_bytes=5_000)
        documents = documents_of(out, "train") + documents_of(out, "val")
        assert "".join(documents).encode() == text and not meta["skipped"]


def test_a_folder_may_contain_several_formats_and_any_number_of_workers_may_read_it(tmp_path):
    for name in ("rows.jsonl", "rows.jsonl.zst", "table.csv", "table.parquet", "stream.arrow"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_sample(tmp_path / "in" / name)
    (tmp_path / "in" / "book.txt").write_text("".join(DOCUMENTS))
    for workers in (1, 2):
        meta = encode_source(
            tmp_path / "in", tmp_path / str(workers), workers=workers, piece_bytes=3_000
        )
    assert sum(meta["documents"].values()) == 5 * len(DOCUMENTS) + 2  # the text is cut
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_training_encodes_tables_and_its_errors_name_its_own_flag(tmp_path):
    source = write_sample(tmp_path / "table.parquet")
    cfg = DataConfig(text=str(source), val_fraction=0.1)
    train, val = (open_corpus(cfg, split, 256, tmp_path / "run") for split in ("train", "val"))
    assert train.tokens + val.tokens == sum(len(d.encode()) + 1 for d in DOCUMENTS)
    with pytest.raises(ValueError, match=r"'id', 'text';.*--data\.text_field"):
        open_corpus(DataConfig(text=str(source), text_field="body"), "train", 256, tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "table.csv", "table.parquet", "file.arrow"]
)
def test_the_error_for_a_missing_column_lists_the_columns_and_names_the_flag(
    name, tmp_path, capsys
):
    source = write_sample(tmp_path / name)
    command = ["--input", str(source), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--workers", "1", "--text_field", "content"])
    message = str(stop.value.code)
    assert name in message and "'id', 'text'" in message and "data.text" not in message
    assert message.endswith("Set --text_field to the key or column that holds the text.")
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
def test_a_file_of_another_format_is_skipped_and_counted_under_its_format(
    content, reason, tmp_path
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "other").write_bytes(content)
    with pytest.raises(ValueError, match=f"at least one document.*1 {reason}"):
        encode_source(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "book.txt").write_text("".join(DOCUMENTS))
    assert encode_source(tmp_path / "in", tmp_path / "out")["skipped"] == {reason: 1}


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
def test_text_that_begins_like_json_is_text(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    encode_source(tmp_path / name, tmp_path / "out", val_fraction=0.0)
    assert documents_of(tmp_path / "out", "train") == [content]

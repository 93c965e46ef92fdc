"""Documents and files that cannot be used are counted and located; all others are encoded."""

import gzip
import json
import os

import pyarrow.parquet as pq
import pytest
from data_samples import (
    DOCUMENTS,
    all_documents_of,
    arrow,
    documents_of,
    encode_source,
    parquet,
    separated,
    write_sample,
    zstd,
)

from jaxtrain.data import tokenizer as tokenizers
from jaxtrain.data.encoding import documents, readers

pytestmark = pytest.mark.usefixtures("shard_cache")


BAD_LINES = {
    "no JSON": (b"no json", "found invalid JSON"),
    "nested too deep": (b'{"text": ' + b"[" * 200_000, "nested too deep"),
    "another key": (b'{"other": "x"}', "found the keys 'other'"),
    "an array": (b"[1]", "found list"),
    "a number": (b'{"text": 3}', "found int"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "not UTF-8"),
    "a NUL": (b'{"text": "a\\u0000b"}', "NUL"),
    "half a surrogate": (b'{"text": "\\ud800"}', "not UTF-8"),
    "a huge number": (b'{"text": ' + b"9" * 5_000 + b"}", "found invalid JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_skipped_and_located_by_file_line_and_byte(kind, suffix, tmp_path):
    line, found = BAD_LINES[kind]
    good = [json.dumps({"text": document}).encode() for document in DOCUMENTS]
    content = b"\n".join([*good[:50], line, *good[50:]])
    source = tmp_path / f"rows.{suffix}"
    source.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith("gz") else content)
    meta = encode_source(source, tmp_path / "out", piece_bytes=2_000)
    assert all_documents_of(tmp_path / "out") == sorted(DOCUMENTS)
    place = f"{source}, line 51, byte {len(b'x'.join(good[:50])) + 1:,}: "
    [problem] = meta["problems"]
    assert problem.startswith(place) and found in problem
    assert sum(meta["skipped"].values()) == 1
    with pytest.raises(ValueError) as error:
        encode_source(source, tmp_path / "stopped", on_bad_document="stop")
    assert str(error.value).startswith(place)


def test_a_document_that_the_tokenizer_refuses_is_skipped_and_located(tmp_path, monkeypatch):
    source = write_sample(tmp_path / "rows.jsonl")

    class Panic(BaseException):
        """Like pyo3's PanicException, which is not an Exception."""

    encode_text = tokenizers.ByteTokenizer.encode

    def panics(self, text):
        if text.startswith("77:"):
            raise Panic("StackOverflow\nand much more")
        return encode_text(self, text)

    monkeypatch.setattr(tokenizers.ByteTokenizer, "encode", panics)
    meta = encode_source(source, tmp_path / "out")
    assert meta["skipped"] == {"refused by the tokenizer": 1}
    assert "line 78, byte" in meta["problems"][0] and "StackOverflow" in meta["problems"][0]


def test_bad_elements_of_an_array_and_bad_rows_of_csv_are_skipped_one_by_one(tmp_path):
    parts = [
        '{"text": "a"}',
        "3",
        '{"text": [[1]]}',
        "null",
        '"b"',
        '{"text": "c",}',
        '{"text":"d"}',
        '"e"',
    ]
    (tmp_path / "a.json").write_text("\n [" + ", ".join(parts) + "]\n")
    (tmp_path / "a.csv").write_text('id,text\n1,a\n2\n\n3,"b, ""c""\nd"\n4,\n')
    meta = encode_source(tmp_path / "a.json", tmp_path / "json", val_fraction=0.0, piece_bytes=8)
    assert documents_of(tmp_path / "json", "train") == ["a", "b", "d", "e"]
    assert sum(meta["skipped"].values()) == 4 and "byte 18: expected" in meta["problems"][0]
    meta = encode_source(tmp_path / "a.csv", tmp_path / "csv", val_fraction=0.0)
    assert documents_of(tmp_path / "csv", "train") == ["a", 'b, "c"\nd']
    assert meta["skipped"] == {"empty": 1, "with too few fields": 1}
    assert "a.csv, row 2: expected 2 fields; found 1" in meta["problems"][0]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_truncated_file_is_read_as_far_as_possible_and_reported(kind, tmp_path):
    lines = [json.dumps({"text": f"{i} {os.urandom(60_000).hex()}"}) for i in range(20)]
    content = "\n".join(lines).encode()
    packed = gzip.compress(content, mtime=0) if kind == "gz" else zstd(content)
    source = tmp_path / f"rows.jsonl.{kind}"
    source.write_bytes(packed[: len(packed) * 9 // 10])
    meta = encode_source(source, tmp_path / "out", piece_bytes=50_000)
    assert 12 <= sum(meta["documents"].values()) < 20
    assert meta["skipped"] == {"damaged": 1}
    assert f"{source}, line " in meta["problems"][0] and "cannot be read" in meta["problems"][0]
    third = len(packed) // 3
    source.write_bytes(packed[:third] + b"\xff" * 2 * third)
    with pytest.raises(ValueError, match=rf"bytes on disk.*jsonl\.{kind}.*cannot be read"):
        encode_source(source, tmp_path / "half")


def test_a_damaged_row_group_is_reported_and_the_others_are_read(tmp_path):
    source = tmp_path / "a.parquet"
    parquet(source, compression="zstd")
    column = pq.ParquetFile(source).metadata.row_group(1).column(1)
    content = bytearray(source.read_bytes())
    begin = column.data_page_offset  # of a page's header
    content[begin : begin + 20] = b"\xff" * 20
    source.write_bytes(content)
    meta = encode_source(source, tmp_path / "out")
    assert set(all_documents_of(tmp_path / "out")) >= {*DOCUMENTS[:70], *DOCUMENTS[140:]}
    assert meta["skipped"] == {"damaged": 1}
    assert "a.parquet, row 70: the rest of row group 1 cannot be read" in meta["problems"][0]


DAMAGED = {
    "footer.parquet": lambda path: parquet(path)[:-100],
    "head.arrow": lambda path: arrow(path, stream=False)[:200],
    "rest.arrow": lambda path: arrow(path, stream=True)[:1_000],
    "flipped.txt.gz": lambda path: gzip.compress(bytes(range(65, 91)) * 999)[:-9] + b"123456789",
    "array.json": lambda path: json.dumps(DOCUMENTS).encode()[:-500],
    "flipped.csv.zst": lambda path: zstd(separated(path, ","))[:-50] + b"x" * 50,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_among_good_ones_is_reported(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(DAMAGED[name](folder / name))
    (folder / "book.txt").write_text("".join(DOCUMENTS) * 9)
    meta = encode_source(folder, tmp_path / "out")
    assert sum(meta["skipped"].values()) == 1 and name in meta["problems"][0]
    with pytest.raises(ValueError, match=name):
        encode_source(folder, tmp_path / "stopped", on_bad_document="stop")


def test_an_encoding_is_refused_if_most_documents_are_bad(tmp_path):
    lines = ['{"text": "good"}'] * 10 + ["bad"] * 11
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="11 of 21 documents.*line 11, byte 170: "):
        encode_source(tmp_path / "a.jsonl", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_line_longer_than_the_limit_is_skipped(tmp_path, monkeypatch):
    for module in (documents, readers):
        monkeypatch.setattr(module, "DOCUMENT_BYTES", 10_000)
    lines = [json.dumps({"text": text}) for text in ("a", "b" * 300_000, "c", "d" * 9_000)]
    content = "\n".join(lines).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    for name in ("a.jsonl", "a.jsonl.gz"):
        for piece_bytes in (1_000, 1 << 20):
            out = tmp_path / f"{name}{piece_bytes}"
            meta = encode_source(tmp_path / name, out, val_fraction=0.0, piece_bytes=piece_bytes)
            assert documents_of(out, "train") == ["a", "c", "d" * 9_000]
            assert meta["skipped"] == {"too long": 1} and "line 2, byte 14: " in meta["problems"][0]

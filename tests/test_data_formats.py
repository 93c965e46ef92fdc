"""Every format of text that is read: gzip, zstd, JSON, CSV, parquet, Arrow; and damaged ones."""

import csv
import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtrain.config import DataConfig
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encode import encode, main
from jaxtrain.data.text import list_files

DOCUMENTS = [f'{i}: "é", a\n' + f"line\t{i}\n" * (i % 13) for i in range(200)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def zstd(content: bytes, frames=1) -> bytes:
    size = -(-len(content) // frames)
    parts = (content[i * size : (i + 1) * size] for i in range(frames))
    return b"".join(bytes(pa.compress(part, "zstd", asbytes=True)) for part in parts)


def json_lines(field="text") -> bytes:
    return "".join(json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(DOCUMENTS)).encode()


def separated(path, delimiter) -> bytes:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(DOCUMENTS))
    return path.read_bytes()


def arrow(path, stream) -> bytes:
    table = pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    return path.read_bytes()


def parquet(path, texts=None, **knobs) -> bytes:
    texts = DOCUMENTS if texts is None else texts
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, path, **{"row_group_size": 70} | knobs)
    return path.read_bytes()


SAMPLES = {
    "rows.jsonl": lambda path: json_lines(),
    "rows.jsonl.gz": lambda path: gzip.compress(json_lines()),
    "members.jsonl.gz": lambda path: (
        gzip.compress(json_lines()[:777]) + gzip.compress(json_lines()[777:]) + bytes(512)
    ),
    "rows.jsonl.zst": lambda path: zstd(json_lines()),
    "frames.jsonl.zst": lambda path: zstd(json_lines(), frames=5),
    "lines.txt": lambda path: json_lines(),
    "array.json": lambda path: json.dumps([{"text": d} for d in DOCUMENTS], indent=1).encode(),
    "strings.json.gz": lambda path: gzip.compress(json.dumps(DOCUMENTS).encode()),
    "table.csv": lambda path: b"\xef\xbb\xbf" + separated(path, ","),
    "table.tsv": lambda path: separated(path, "\t"),
    "table.csv.zst": lambda path: zstd(separated(path, ";")),
    "table.parquet": parquet,
    "dictionary": lambda path: parquet(
        path, pa.array(DOCUMENTS).dictionary_encode(), compression="zstd"
    ),
    "large.parquet": lambda path: parquet(path, pa.array(DOCUMENTS, pa.large_string())),
    "file.arrow": lambda path: arrow(path, stream=False),
    "stream.arrow": lambda path: arrow(path, stream=True),
}


def write(path, kind=None):
    path.write_bytes(SAMPLES[kind or path.name](path))
    return path


def documents_of(folder, split):
    found = []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        tokens = np.fromfile(path, "<u2", offset=1024).astype(np.uint8).tobytes()
        assert tokens[:1] == b"\0"
        found += [document.decode() for document in tokens[1:].split(b"\0")]
    return found


def run(source, out, **knobs):
    files = list_files(str(source), exclude=out)
    return encode(files, out, "bytes", **{"val_fraction": 0.1} | knobs)


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
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.zst").write_bytes(zstd(text, frames=3))
    for name in ("plain", "a.txt.gz", "a.zst"):
        run(tmp_path / name, tmp_path / "out" / name, piece_bytes=5_000)
    for split in ("train", "val"):
        file = f"text_{split}_000000.bin"
        found = {
            (tmp_path / "out" / name / file).read_bytes() for name in os.listdir(tmp_path / "out")
        }
        assert len(found) == 1


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
    with pytest.raises(ValueError, match=r"'id', 'text'\n.*--data\.text_field"):
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


BAD_LINES = {
    "no JSON": (b"no json", "found no JSON"),
    "nested too deep": (b'{"text": ' + b"[" * 200_000, "nested too deep"),
    "another key": (b'{"other": "x"}', "found 'other'"),
    "a number": (b'{"text": 3}', "found int"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "not UTF-8"),
    "a NUL": (b'{"text": "a\\u0000b"}', "NUL"),
    "half a surrogate": (b'{"text": "\\ud800"}', "not UTF-8"),
    "a huge number": (b'{"text": ' + b"9" * 5_000 + b"}", "found no JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_counted_and_named_by_file_line_and_byte(kind, suffix, tmp_path):
    line, found = BAD_LINES[kind]
    good = [json.dumps({"text": document}).encode() for document in DOCUMENTS]
    content = b"\n".join([*good[:50], line, *good[50:]])
    source = tmp_path / f"rows.{suffix}"
    source.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    meta = run(source, tmp_path / "out", piece_bytes=2_000)
    split = [documents_of(tmp_path / "out", s) for s in ("train", "val")]
    assert sorted(split[0] + split[1]) == sorted(DOCUMENTS)
    place = f"{source}, line 51, byte {len(b'x'.join(good[:50])) + 1:,}: "
    [problem] = meta["problems"]
    assert problem.startswith(place) and found in problem
    assert sum(meta["skipped"].values()) == 1
    with pytest.raises(ValueError) as error:
        run(source, tmp_path / "stopped", on_bad_document="stop")
    assert str(error.value).startswith(place)


def test_a_document_that_the_tokenizer_refuses_is_skipped_and_located(tmp_path, monkeypatch):
    source = write(tmp_path / "rows.jsonl")

    class Panic(BaseException):
        """As pyo3's PanicException, which is no Exception."""

    from jaxtrain.data import tokenizer as tokenizers

    encode_text = tokenizers.ByteTokenizer.encode

    def panics(self, text):
        if text.startswith("77:"):
            raise Panic("StackOverflow\nand much more")
        return encode_text(self, text)

    monkeypatch.setattr(tokenizers.ByteTokenizer, "encode", panics)
    meta = run(source, tmp_path / "out")
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
    meta = run(tmp_path / "a.json", tmp_path / "json", val_fraction=0.0, piece_bytes=8)
    assert documents_of(tmp_path / "json", "train") == ["a", "b", "d", "e"]
    assert sum(meta["skipped"].values()) == 4 and "byte 18: expected" in meta["problems"][0]
    meta = run(tmp_path / "a.csv", tmp_path / "csv", val_fraction=0.0)
    assert documents_of(tmp_path / "csv", "train") == ["a", 'b, "c"\nd']
    assert meta["skipped"] == {"empty": 1, "with too few fields": 1}
    assert "a.csv, row 2: expected 2 fields; found 1" in meta["problems"][0]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_truncated_file_gives_what_comes_before_and_is_named(kind, tmp_path):
    lines = [json.dumps({"text": f"{i} {os.urandom(60_000).hex()}"}) for i in range(20)]
    content = "\n".join(lines).encode()
    packed = gzip.compress(content) if kind == "gz" else zstd(content)
    source = tmp_path / f"rows.jsonl.{kind}"
    source.write_bytes(packed[: len(packed) * 9 // 10])
    meta = run(source, tmp_path / "out", piece_bytes=50_000)
    assert 12 <= sum(meta["documents"].values()) < 20
    assert meta["skipped"] == {"damaged": 1}
    assert f"{source}, line " in meta["problems"][0] and "cannot be read" in meta["problems"][0]
    third = len(packed) // 3
    source.write_bytes(packed[:third] + b"\xff" * 2 * third)
    with pytest.raises(ValueError, match=rf"bytes on disk.*\n.*jsonl\.{kind}.*cannot be read"):
        run(source, tmp_path / "half")


def test_a_damaged_group_of_a_parquet_file_is_named_and_the_others_are_read(tmp_path):
    source = tmp_path / "a.parquet"
    parquet(source, compression="zstd")
    column = pq.ParquetFile(source).metadata.row_group(1).column(1)
    content = bytearray(source.read_bytes())
    begin = column.data_page_offset  # of a page's header
    content[begin : begin + 20] = b"\xff" * 20
    source.write_bytes(content)
    meta = run(source, tmp_path / "out")
    split = [documents_of(tmp_path / "out", s) for s in ("train", "val")]
    assert set(split[0] + split[1]) >= {*DOCUMENTS[:70], *DOCUMENTS[140:]}
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
def test_a_damaged_file_among_good_ones_is_counted_and_named(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(DAMAGED[name](folder / name))
    (folder / "book.txt").write_text("".join(DOCUMENTS) * 9)
    meta = run(folder, tmp_path / "out")
    assert sum(meta["skipped"].values()) == 1 and name in meta["problems"][0]
    with pytest.raises(ValueError, match=name):
        run(folder, tmp_path / "stopped", on_bad_document="stop")


def test_where_most_documents_are_bad_the_encoding_is_refused(tmp_path):
    lines = ['{"text": "good"}'] * 10 + ["bad"] * 11
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"11 of 21 documents.*\n.*line 11, byte 170.*") as error:
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert "and 6 more" in str(error.value) and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04" + bytes(99), "zip archives"),
        (b"\xfd7zXZ\x00" + bytes(99), "compressed by xz"),
        (gzip.compress(b"a" * 257 + b"ustar" + bytes(99)), "tar archives"),
        (gzip.compress(b"PAR1" + bytes(99)), "tables compressed by gzip"),
        (gzip.compress(b""), "empty"),
        (gzip.compress("é".encode("latin-1")), "not UTF-8"),
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
        ("package.json", '{\n "name": "x"\n}\n'),
    ],
)
def test_text_that_only_begins_like_json_is_text(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    run(tmp_path / name, tmp_path / "out", val_fraction=0.0)
    assert documents_of(tmp_path / "out", "train") == [content]


def test_a_line_longer_than_the_limit_is_skipped_without_being_read(tmp_path, monkeypatch):
    from jaxtrain.data import documents, readers

    for module in (documents, readers):
        monkeypatch.setattr(module, "DOCUMENT_BYTES", 10_000)
    lines = [json.dumps({"text": text}) for text in ("a", "b" * 300_000, "c", "d" * 9_000)]
    content = "\n".join(lines).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz"):
        for piece_bytes in (1_000, 1 << 20):
            out = tmp_path / f"{name}{piece_bytes}"
            meta = run(tmp_path / name, out, val_fraction=0.0, piece_bytes=piece_bytes)
            assert documents_of(out, "train") == ["a", "c", "d" * 9_000]
            assert meta["skipped"] == {"too long": 1} and "line 2, byte 14: " in meta["problems"][0]

"""Whole encodings: every document ends up in one split, and no change of the input is missed."""

import gzip
import json

import numpy as np
import pytest
from data_samples import (
    change_after_planning,
    contents,
    documents_of,
    encode_source,
    open_shards,
    tokens_of,
    write_modules,
)

from jaxtrain.data import tokenizer as tokenizers
from jaxtrain.data.encoding import journal, pipeline
from jaxtrain.data.encoding.divide_input import divide_input
from jaxtrain.data.encoding.documents import encode_pieces
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.work_units import Piece
from jaxtrain.data.tokenizer import build_tokenizer

pytestmark = pytest.mark.usefixtures("shard_cache")
SPLITS = ("train", "val")


@pytest.fixture
def modules(tmp_path):
    return write_modules(tmp_path / "texts")


def token_documents(tokens, eot):
    starts = np.flatnonzero(tokens == eot)
    assert starts[0] == 0, "a corpus begins with a document"
    return [part[1:] for part in np.split(tokens, starts[1:])]


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_every_document_is_in_one_split_and_decodes_to_its_text(name, modules, tmp_path):
    tokenizer = build_tokenizer(name)
    encode_source(modules, tmp_path / "out", name, val_fraction=0.2)
    decoded = [
        tokenizer.decode(ids)
        for split in SPLITS
        for ids in token_documents(tokens_of(open_shards(tmp_path / "out", split)), tokenizer.eot)
    ]
    originals = [path.read_text(encoding="utf-8") for path in modules.rglob("*.py")]
    assert sorted(decoded) == sorted(originals)


def test_the_result_does_not_depend_on_the_number_of_workers(modules, tmp_path):
    options = {"shard_tokens": 10_000, "piece_bytes": 20_000}
    for workers in (1, 2):
        encode_source(modules, tmp_path / str(workers), "gpt2", workers=workers, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1", "*.bin")) > 2


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_cutting_a_long_text_into_pieces_changes_no_token(name, modules, tmp_path):
    joined = tmp_path / "joined.txt"
    joined.write_bytes(b"".join(path.read_bytes() for path in sorted(modules.rglob("*.py"))))
    for piece_bytes in (10_000, 1 << 30):
        out = tmp_path / str(piece_bytes)
        encode_source(joined, out, name, val_fraction=0.0, piece_bytes=piece_bytes)
    assert contents(tmp_path / "10000", "*.bin") == contents(tmp_path / str(1 << 30), "*.bin")
    files, tokenizer = list_files(str(joined), exclude=tmp_path), build_tokenizer(name)
    units, _ = divide_input(files, 0.0, "text", tokenizer, 10_000)
    assert len(units) > 10


def test_a_text_without_newlines_is_cut_between_characters(tmp_path):
    (tmp_path / "long.txt").write_text("你好🦊é" * 5_000, encoding="utf-8")
    encode_source(tmp_path / "long.txt", tmp_path / "out", val_fraction=0.0, piece_bytes=1_001)
    assert documents_of(tmp_path / "out", "train") == ["你好🦊é" * 5_000]


def test_the_metadata_counts_tokens_and_text_bytes_of_each_shard(modules, tmp_path):
    meta = encode_source(modules, tmp_path / "out", "gpt2", shard_tokens=5_000)
    text_bytes = sum(path.stat().st_size for path in modules.rglob("*.py"))
    assert sum(entry["text_bytes"] for entry in meta["shards"]) == text_bytes
    train = [entry for entry in meta["shards"] if entry["split"] == "train"]
    assert {entry["tokens"] for entry in train[:-1]} == {5_000} and 0 < train[-1]["tokens"] <= 5_000
    assert all(1 < entry["text_bytes"] / entry["tokens"] < 8 for entry in meta["shards"])
    corpus = open_shards(tmp_path / "out")
    assert (corpus.tokenizer_name, corpus.eot) == ("gpt2", 50_256)
    expected = sum(entry["text_bytes"] for entry in train) / corpus.tokens
    assert corpus.bytes_per_token == pytest.approx(expected, rel=1e-12)


def test_the_held_out_share_is_close_to_val_fraction(modules, tmp_path):
    for fraction in (0.02, 0.1, 0.4):
        meta = encode_source(modules, tmp_path / str(fraction), val_fraction=fraction)
        tokens = dict.fromkeys(SPLITS, 0)
        for entry in meta["shards"]:
            tokens[entry["split"]] += entry["tokens"]
        assert 0.4 * fraction < tokens["val"] / sum(tokens.values()) < 1.1 * fraction


def test_the_last_part_of_a_single_file_is_held_out(tmp_path):
    text = "".join(f"line {i} of a text\n" for i in range(5_000))
    (tmp_path / "one.txt").write_text(text)
    encode_source(tmp_path / "one.txt", tmp_path / "out", val_fraction=0.25)
    [train], [val] = (documents_of(tmp_path / "out", split) for split in SPLITS)
    assert train + val == text and 0.24 < len(val) / len(text) < 0.26


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path):
    texts = [f"document {i}\n\nline é {i}" for i in range(400)]
    lines = "\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(texts))
    (tmp_path / "rows.jsonl").write_text(lines + "\n\n")
    options = {"val_fraction": 0.2, "text_field": "body"}
    encode_source(tmp_path / "rows.jsonl", tmp_path / "a", **options)
    encode_source(tmp_path / "rows.jsonl", tmp_path / "b", piece_bytes=1_000, **options)
    assert contents(tmp_path / "a", "*.bin") == contents(tmp_path / "b", "*.bin")
    train, val = (documents_of(tmp_path / "a", split) for split in SPLITS)
    assert sorted(train + val) == sorted(texts) and 40 < len(val) < 120


def test_files_without_text_are_skipped_and_counted(modules, tmp_path):
    (modules / "nul.txt").write_bytes(b"a\0b")
    (modules / "latin.txt").write_bytes("é".encode("latin-1"))
    (modules / "empty.txt").write_bytes(b"")
    (modules / ".hidden").write_bytes(b"hidden")
    meta = encode_source(modules, tmp_path / "out", val_fraction=0.0)
    assert meta["skipped"] == {"empty": 1, "holding NUL bytes": 1, "not UTF-8": 1}
    assert len(documents_of(tmp_path / "out", "train")) == 30
    for path in modules.rglob("*.py"):
        path.unlink()
    with pytest.raises(ValueError, match="at least one document.*1 holding NUL bytes"):
        encode_source(modules, tmp_path / "none")


@pytest.fixture
def changing(tmp_path):
    """Text files, JSON lines and a compressed text, which a test changes during the encoding."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"text {i}\n" * 100)
    lines = [json.dumps({"text": f"line {i}"}) for i in range(100)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a compressed text\n" * 9, mtime=0))
    return folder


CHANGES = {
    "a text grows": ("3.txt", lambda path: path.write_text("text 3\n" * 101)),
    "a text is rewritten": ("3.txt", lambda path: path.write_text("TEXT 3\n" * 100)),
    "a text is emptied": ("3.txt", lambda path: path.write_text("")),
    "a text is removed": ("3.txt", lambda path: path.unlink()),
    "lines are cut": ("rows.jsonl", lambda path: path.write_text('{"text": "x"}')),
    "gzip is cut": ("a.txt.gz", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "gzip is replaced": ("a.txt.gz", lambda path: path.write_bytes(gzip.compress(b"a"))),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_that_changes_during_the_encoding_is_named_and_nothing_is_written(
    kind, changing, tmp_path
):
    name, change = CHANGES[kind]
    message = rf"must not change while.*{name} did\. Run the same com"
    with pytest.MonkeyPatch.context() as patch:
        change_after_planning(patch, lambda: change(changing / name))
        with pytest.raises(ValueError, match=message):
            encode_source(changing, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert not encode_source(changing, tmp_path / "out")["skipped"].get("unreadable")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_the_bytes_of_a_piece_that_became_shorter_count_as_lost(kind, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text('{"text": "x"}\n' * 10)
    for limit in (1 << 20, 100):  # lines are read all at once, or one by one
        monkeypatch.setattr("jaxtrain.data.encoding.documents.DOCUMENT_BYTES", limit)
        piece = Piece(str(path), "file", 0, 200, kind)
        encoded = encode_pieces([piece], build_tokenizer("bytes"), EncodeOptions("bytes"))
        assert encoded.lost_bytes == 200
        [problem] = encoded.problems
        assert problem.reason == "unreadable" and "ends at byte 140" in problem.found


def test_an_encoding_is_refused_if_most_bytes_can_no_longer_be_read(
    changing, tmp_path, monkeypatch
):
    def remove():
        for i in range(9):
            (changing / f"{i}.txt").unlink()

    change_after_planning(monkeypatch, remove)
    with pytest.raises(ValueError, match="bytes on disk that cannot, first .*0.txt, byte 0: "):
        encode_source(changing, tmp_path / "out")


def test_a_document_whose_tokens_contain_eot_is_skipped_and_located(tmp_path, monkeypatch):
    encode_text = tokenizers.ByteTokenizer.encode

    def append_eot(self, text):
        ids = encode_text(self, text)
        return np.append(ids, self.eot).astype(ids.dtype) if text == "line 4" else ids

    monkeypatch.setattr(tokenizers.ByteTokenizer, "encode", append_eot)
    lines = [json.dumps({"text": f"line {i}"}) for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    meta = encode_source(tmp_path / "a.jsonl", tmp_path / "out", val_fraction=0.0)
    assert meta["skipped"] == {"refused by the tokenizer": 1}
    assert "line 5, byte" in meta["problems"][0]
    assert "must not contain the token that starts documents" in meta["problems"][0]
    assert len(documents_of(tmp_path / "out", "train")) == 8


def test_an_error_that_may_not_occur_again_leaves_the_journal_in_place(
    changing, tmp_path, monkeypatch
):
    def fail(*_):
        raise UnicodeError("of a library")  # a ValueError, but not UnusableInput

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_publish", fail)
        with pytest.raises(UnicodeError):
            encode_source(changing, tmp_path / "out")
    [folder] = (tmp_path / "out").glob(f"{journal.STATE}*")
    assert (folder / journal.PROGRESS).exists()
    assert encode_source(changing, tmp_path / "out")["documents"]["train"]

"""Input that changes or cannot be read any more while it is encoded is never lost in silence."""

import gzip
import json

import numpy as np
import pytest
from data_samples import documents_of, run

from jaxtrain.data import tokenizer
from jaxtrain.data.encoding import journal, pipeline
from jaxtrain.data.encoding.documents import Options, Piece, encode_pieces
from jaxtrain.data.tokenizer import build_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"text {i}\n" * 100)
    lines = [json.dumps({"text": f"line {i}"}) for i in range(100)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a compressed text\n" * 9, mtime=0))
    return folder


def after_planning(monkeypatch, change):
    """Changes the input when its units are planned, as another program may."""
    plan = pipeline.divide_input

    def plan_and_change(*args):
        planned = plan(*args)
        change()
        return planned

    monkeypatch.setattr(pipeline, "divide_input", plan_and_change)


CHANGES = {
    "grows": ("3.txt", lambda path: path.write_text("text 3\n" * 101)),
    "is rewritten": ("3.txt", lambda path: path.write_text("TEXT 3\n" * 100)),
    "is emptied": ("3.txt", lambda path: path.write_text("")),
    "is removed": ("3.txt", lambda path: path.unlink()),
    "is cut, of lines": ("rows.jsonl", lambda path: path.write_text('{"text": "x"}')),
    "is cut, of gzip": ("a.txt.gz", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "is another, of gzip": ("a.txt.gz", lambda path: path.write_bytes(gzip.compress(b"a"))),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_that_changes_while_it_is_encoded_is_named_and_nothing_is_written(
    kind, folder, tmp_path, monkeypatch
):
    name, change = CHANGES[kind]
    after_planning(monkeypatch, lambda: change(folder / name))
    with pytest.raises(ValueError, match=rf"must not change while.*{name} did\. Run the same com"):
        run(folder, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not run(folder, tmp_path / "out")["skipped"].get("unreadable")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_the_bytes_of_what_is_shorter_than_planned_count_as_lost(kind, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text('{"text": "x"}\n' * 10)
    for limit in (1 << 20, 100):  # a piece of lines is read at once, or line by line
        monkeypatch.setattr("jaxtrain.data.encoding.documents.DOCUMENT_BYTES", limit)
        piece = Piece(str(path), "file", 0, 200, kind)
        encoded = encode_pieces([piece], build_tokenizer("bytes"), Options())
        assert encoded.lost_bytes == 200
        [problem] = encoded.problems
        assert problem.reason == "unreadable" and "ends at byte 140" in problem.found


def test_where_most_bytes_cannot_be_read_any_more_the_encoding_is_refused(
    folder, tmp_path, monkeypatch
):
    def remove():
        for i in range(9):
            (folder / f"{i}.txt").unlink()

    after_planning(monkeypatch, remove)
    with pytest.raises(ValueError, match="bytes on disk that cannot, first .*0.txt, byte 0: "):
        run(folder, tmp_path / "out")


def test_a_document_that_holds_the_start_token_is_skipped_and_located(tmp_path, monkeypatch):
    encode_text = tokenizer.ByteTokenizer.encode

    def spells_the_start(self, text):
        ids = encode_text(self, text)
        return np.append(ids, self.eot).astype(ids.dtype) if text == "line 4" else ids

    monkeypatch.setattr(tokenizer.ByteTokenizer, "encode", spells_the_start)
    lines = [json.dumps({"text": f"line {i}"}) for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    meta = run(tmp_path / "a.jsonl", tmp_path / "out", val_fraction=0.0)
    assert meta["skipped"] == {"refused by the tokenizer": 1}
    assert "line 5, byte" in meta["problems"][0]
    assert "must not hold the token that starts documents" in meta["problems"][0]
    assert len(documents_of(tmp_path / "out", "train")) == 8


def test_an_error_that_a_repeat_may_not_meet_keeps_the_journal(folder, tmp_path, monkeypatch):
    publish = pipeline._publish

    def fails(*_):
        raise UnicodeError("of a library")  # a ValueError

    monkeypatch.setattr(pipeline, "_publish", fails)
    with pytest.raises(UnicodeError):
        run(folder, tmp_path / "out")
    [kept] = (tmp_path / "out").glob(f"{journal.STATE}*")
    assert (kept / journal.PROGRESS).exists()
    monkeypatch.setattr(pipeline, "_publish", publish)
    assert run(folder, tmp_path / "out")["documents"]["train"]

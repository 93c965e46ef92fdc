"""JSON is parsed in every layout and under every file name, or skipped; never read as text."""

import json

import pytest
from data_samples import DOCUMENTS, documents_of, encode_source, zstd

pytestmark = pytest.mark.usefixtures("shard_cache")


OBJECTS = [{"id": i, "text": text, "more": [{"text": "no"}]} for i, text in enumerate(DOCUMENTS)]
LAYOUTS = {
    "pretty objects": "\n".join(json.dumps(record, indent=2) for record in OBJECTS),
    "objects end to end": "".join(json.dumps(record, indent=1) for record in OBJECTS),
    "a pretty array": json.dumps(OBJECTS, indent=4),
    "arrays and objects": "\n".join(
        json.dumps(record if i % 2 else [record], indent=2) for i, record in enumerate(OBJECTS)
    ),
    "strings": json.dumps(DOCUMENTS),
    "long strings": json.dumps([text + "\n" * 70_000 for text in DOCUMENTS[:4]]),
}


@pytest.mark.parametrize("suffix", ["", ".json", ".txt", ".zst"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_of_every_layout_and_name_gives_its_documents(layout, suffix, tmp_path):
    content = b"\xef\xbb\xbf" + LAYOUTS[layout].encode()
    (tmp_path / f"in{suffix}").write_bytes(zstd(content) if suffix == ".zst" else content)
    for piece_bytes in (600, 1 << 20):
        out = tmp_path / str(piece_bytes)
        meta = encode_source(
            tmp_path / f"in{suffix}", out, val_fraction=0.0, piece_bytes=piece_bytes
        )
        expected = DOCUMENTS[:4] if layout == "long strings" else DOCUMENTS
        assert [text.rstrip() for text in documents_of(out, "train")] == [
            text.rstrip() for text in expected
        ]
        assert not meta["skipped"]


def test_one_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "a text"}, indent=2))
    encode_source(tmp_path / "a.json", tmp_path / "out", val_fraction=0.0)
    assert documents_of(tmp_path / "out", "train") == ["a text"]


OTHERS = {
    "a package": json.dumps({"name": "x", "version": 1}, indent=2),
    "a long object": json.dumps({str(i): i for i in range(20_000)}, indent=2),
    "numbers": json.dumps(list(range(100))),
    "many numbers": json.dumps(list(range(100_000)), indent=1),
    "nothing": "[]",
}


@pytest.mark.parametrize("suffix", ["", ".json"])
@pytest.mark.parametrize("kind", OTHERS)
def test_json_without_the_text_field_is_skipped_and_counted(kind, suffix, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"other{i}{suffix}").write_text(OTHERS[kind])
    (tmp_path / "in" / "a.txt").write_text("a text\n")
    meta = encode_source(tmp_path / "in", tmp_path / "out", val_fraction=0.0)
    assert documents_of(tmp_path / "out", "train") == ["a text\n"]
    assert meta["skipped"] == {"JSON without the text field 'text'": 3}


def test_the_error_for_json_without_the_text_field_names_the_flag(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"content": "a text"}, indent=2))
    with pytest.raises(ValueError, match=r"1 JSON without the .*'text'\. Set --data\.text_field"):
        encode_source(tmp_path / "a.json", tmp_path / "out", val_fraction=0.0)


def test_text_between_two_arrays_is_skipped_and_located(tmp_path):
    (tmp_path / "a.json").write_text('["a", "b"] some words ["c"]\n5 ["d"]')
    meta = encode_source(tmp_path / "a.json", tmp_path / "out", val_fraction=0.0)
    assert documents_of(tmp_path / "out", "train") == ["a", "b", "c", "d"]
    assert sum(meta["skipped"].values()) == 2
    assert "a.json, byte 11: " in meta["problems"][0] and "invalid JSON" in meta["problems"][0]

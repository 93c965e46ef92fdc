"""Damaged rows, quotes and pages of tables are counted and located."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import change_after_planning, documents_of, encode_source

pytestmark = pytest.mark.usefixtures("shard_cache")


def encode_and_read(source, tmp_path):
    meta = encode_source(source, tmp_path / "out", val_fraction=0.0)
    return meta, documents_of(tmp_path / "out", "train")


def test_a_csv_row_with_an_unquoted_comma_is_skipped_rather_than_cut(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("id,text\n1,one\n2,two, and its rest\n\n3,three\n4,four\n")
    meta, documents = encode_and_read(source, tmp_path)
    assert documents == ["one", "three", "four"]
    assert meta["skipped"] == {"with too many fields": 1}
    assert "a.csv, row 2: expected 2 fields; found 3" in meta["problems"][0]


@pytest.mark.parametrize(
    ("row", "found"),
    [('61,"opened', "a quote opens here that nothing closes"), ('61,"a"b', "must be doubled")],
)
def test_a_stray_quote_in_csv_ends_the_file_at_its_row_and_merges_no_rows(row, found, tmp_path):
    rows = [f'{i},"document {i}"' for i in range(1, 61)]
    source = tmp_path / "a.csv"
    after = [f"{i},document {i}" for i in range(62, 70)]
    source.write_text("\n".join(["id,text", *rows, row, *after]) + "\n")
    meta, documents = encode_and_read(source, tmp_path)
    assert documents == [f"document {i}" for i in range(1, 61)]
    assert meta["skipped"] == {"damaged": 1}
    assert "a.csv, row 61: " in meta["problems"][0] and found in meta["problems"][0]
    source.write_text("\n".join(["id,text", *rows[:2], row, *after]) + "\n")
    with pytest.raises(ValueError, match="bytes on disk that cannot, first .*a.csv, row 3: "):
        encode_source(source, tmp_path / "half", val_fraction=0.0)


def test_two_csv_columns_with_the_name_of_the_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\nsome,thing\n")
    with pytest.raises(ValueError, match="expected a column 'text' of text; found 'text', 'text'"):
        encode_source(tmp_path / "a.csv", tmp_path / "out", val_fraction=0.0)


def test_a_parquet_page_with_a_wrong_checksum_is_not_read(tmp_path):
    source = tmp_path / "a.parquet"
    table = pa.table({"text": [f"document {i}" for i in range(30)]})
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 10}
    pq.write_table(table, source, write_page_checksum=True, **options)
    content = source.read_bytes()
    assert content.count(b"document 15") == 1
    source.write_bytes(content.replace(b"document 15", b"dXcument 15"))
    meta, documents = encode_and_read(source, tmp_path)
    assert documents == [f"document {i}" for i in range(30) if not 10 <= i < 20]
    assert "a.parquet, row 10: the rest of row group 1 cannot be read" in meta["problems"][0]


def test_a_parquet_file_that_is_overwritten_during_the_encoding_is_reported(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("a text\n" * 99)
    source = folder / "b.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), source)
    change_after_planning(monkeypatch, lambda: source.write_bytes(b"PAR1 is all that is left"))
    with pytest.raises(ValueError, match="b.parquet"):
        encode_source(folder, tmp_path / "out", val_fraction=0.0, on_bad_document="stop")

"""Tables whose rows, quotes or pages are damaged: no text is lost without being counted."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import documents_of, run

from jaxtrain.data.encoding import pipeline


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(source, tmp_path):
    meta = run(source, tmp_path / "out", val_fraction=0.0)
    return meta, documents_of(tmp_path / "out", "train")


def test_a_csv_row_with_an_unquoted_comma_is_counted_and_never_cut_there(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("id,text\n1,one\n2,two, and its rest\n\n3,three\n4,four\n")
    meta, documents = encoded(source, tmp_path)
    assert documents == ["one", "three", "four"]
    assert meta["skipped"] == {"with too many fields": 1}
    assert "a.csv, row 2: expected 2 fields; found 3" in meta["problems"][0]


@pytest.mark.parametrize(
    ("row", "found"),
    [('61,"opened', "a quote opens here that nothing closes"), ('61,"a"b', "must be doubled")],
)
def test_a_stray_quote_in_csv_is_named_by_its_row_and_never_merges_rows(row, found, tmp_path):
    rows = [f'{i},"document {i}"' for i in range(1, 61)]
    source = tmp_path / "a.csv"
    after = [f"{i},document {i}" for i in range(62, 70)]
    source.write_text("\n".join(["id,text", *rows, row, *after]) + "\n")
    meta, documents = encoded(source, tmp_path)
    assert documents == [f"document {i}" for i in range(1, 61)]
    assert meta["skipped"] == {"damaged": 1}
    assert "a.csv, row 61: " in meta["problems"][0] and found in meta["problems"][0]
    source.write_text("\n".join(["id,text", *rows[:2], row, *after]) + "\n")
    with pytest.raises(ValueError, match="bytes on disk that cannot, first .*a.csv, row 3: "):
        run(source, tmp_path / "half", val_fraction=0.0)


def test_two_csv_columns_of_the_chosen_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\nsome,thing\n")
    with pytest.raises(ValueError, match="expected a column 'text' of text; found 'text', 'text'"):
        run(tmp_path / "a.csv", tmp_path / "out", val_fraction=0.0)


def test_a_page_of_parquet_that_its_checksum_refutes_is_not_read(tmp_path):
    source = tmp_path / "a.parquet"
    table = pa.table({"text": [f"document {i}" for i in range(30)]})
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 10}
    pq.write_table(table, source, write_page_checksum=True, **options)
    content = source.read_bytes()
    assert content.count(b"document 15") == 1
    source.write_bytes(content.replace(b"document 15", b"dXcument 15"))
    meta, documents = encoded(source, tmp_path)
    assert documents == [f"document {i}" for i in range(30) if not 10 <= i < 20]
    assert "a.parquet, row 10: the rest of row group 1 cannot be read" in meta["problems"][0]


def test_a_parquet_file_that_breaks_after_planning_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("a text\n" * 99)
    source = folder / "b.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), source)
    plan = pipeline.divide_input

    def break_after_planning(*args):
        planned = plan(*args)
        source.write_bytes(b"PAR1 is all that is left")
        return planned

    monkeypatch.setattr(pipeline, "divide_input", break_after_planning)
    with pytest.raises(ValueError, match="b.parquet"):
        run(folder, tmp_path / "out", val_fraction=0.0, on_bad_document="stop")

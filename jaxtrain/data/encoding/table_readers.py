"""Documents out of tables: parquet, Arrow IPC and CSV, read a few rows at a time."""

import csv
import io
import itertools
import os
from collections.abc import Iterator

from jaxtrain.data.encoding.documents import Bad, Problem
from jaxtrain.data.encoding.formats import DAMAGE, DOCUMENT_BYTES, open_content
from jaxtrain.data.encoding.work_units import Task, Unit, damage, tasks_of_rows

BATCH_BYTES = 8 << 20  # of text that is decoded at once, by the average length of a row
BATCH_ROWS = 4096
DELIMITERS = (",", "\t", ";", "|")
COLUMNS_SHOWN, NAME_SHOWN = 20, 40  # columns of a message, and characters of their names


def _no_text(path, text_field, columns, wrong_type="") -> Problem:
    """The Problem of a table without a column of text under `text_field`."""
    names = ", ".join(repr(str(name)[:NAME_SHOWN]) for name in list(columns)[:COLUMNS_SHOWN])
    if len(columns) > COLUMNS_SHOWN:
        names += f" and {len(columns) - COLUMNS_SHOWN} more"
    found = f"found {wrong_type} in it" if wrong_type else f"found {names or 'no column'}"
    reason = f"without a string {text_field!r}"
    return Problem(path, "", "", 0, reason, f"expected a column {text_field!r} of text; {found}")


def parquet_units(path: str, name: str, size: int, text_field: str) -> list[Unit]:
    """Returns a unit for each group of rows, or one that says why the file cannot be used."""
    import pyarrow.parquet as pq  # 0.3 s, for those who need it

    try:
        with _disk(path) as file:
            table = pq.ParquetFile(file, page_checksum_verification=True)
            rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            problem = _check_column(path, table.schema_arrow, text_field)
    except Exception as error:  # damage is an OSError, a ValueError, or pyarrow's own
        problem = damage(path, error)
    if problem:
        return [Unit("problem", size, problem=problem)]
    firsts, total = itertools.accumulate(rows, initial=0), max(1, sum(rows))
    return [
        Unit("parquet", size * n // total, path=path, name=name, group=i, row=first)
        for i, (n, first) in enumerate(zip(rows, firsts, strict=False))
    ]


def read_parquet(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    """Yields tasks of one group of rows; its column is read page by page."""
    import pyarrow.parquet as pq

    read = count = 0

    def rows(file):
        nonlocal read, count
        try:
            table = pq.ParquetFile(
                file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
            )  # page by page
            group = table.metadata.row_group(unit.group)
            count = group.num_rows
            column = next(
                group.column(i)
                for i in range(group.num_columns)
                if group.column(i).path_in_schema == text_field
            )
            long = max(1, column.total_uncompressed_size // max(1, count))
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // long))
            for batch in table.iter_batches(batch_rows, [unit.group], [text_field], False):
                for content in _contents(batch.column(0)):
                    yield unit.row + read, content
                    read += 1
        except Exception as error:  # a missing group or column: the file has changed since
            what = f"the rest of row group {unit.group}"
            yield damage(unit.path, error, unit.row + read, "rows", what=what)

    with _disk(unit.path) as file:
        position = lambda: unit.size * read // max(1, count)
        yield from tasks_of_rows(unit, "rows", rows(file), piece_bytes, position)


def read_arrow(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    """Yields tasks of an Arrow IPC file or stream, one record batch in memory at a time."""
    import pyarrow as pa

    def rows(file):
        at = 0
        try:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file)
            problem = _check_column(unit.path, reader.schema, text_field)
            if problem:
                yield problem
                return
            column = reader.schema.get_field_index(text_field)
            count = reader.num_record_batches if is_file else 0
            for batch in map(reader.get_batch, range(count)) if is_file else reader:
                array = batch.column(column)
                step = max(1, BATCH_BYTES // max(1, array.nbytes // max(1, len(array))))
                for start in range(0, len(array), step):
                    for content in _contents(array.slice(start, step)):
                        yield at, content
                        at += 1
        except Exception as error:
            yield damage(unit.path, error, at, "rows", what="the rest of the file")

    with _disk(unit.path) as file:
        yield from tasks_of_rows(unit, "rows", rows(file), piece_bytes, file.tell)


def read_csv(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    """Yields tasks of a CSV file; its first record names the columns.

    A record that has more or fewer fields than the header is a bad document. What is wrong with
    the quotes ends the file: where the next record begins is then unknown.
    """
    began = 0  # where the record begins that is read now: what is lost if it cannot be read

    def rows(text, position):
        nonlocal began
        csv.field_size_limit(DOCUMENT_BYTES)
        at = 0
        try:
            head = text.readline(DOCUMENT_BYTES)
            lines = itertools.chain([head], text)
            records = csv.reader(lines, delimiter=_delimiter(head), strict=True)
            header = next(records, [])
            if header.count(text_field) != 1:
                yield _no_text(unit.path, text_field, header)
                return
            column = header.index(text_field)
            began = position()
            for at, record in enumerate(records, start=1):
                if len(record) == len(header):
                    yield at, record[column].encode(errors="surrogateescape")
                elif record:
                    many = "many" if len(record) > len(header) else "few"
                    found = f"expected {len(header)} fields; found {len(record)}"
                    yield at, Bad(f"with too {many} fields", found)
                began = position()
        except csv.Error as error:
            what = "the file from this row on"
            yield damage(unit.path, _in_words(error), at + 1, "rows", unit.compression, what)
        except DAMAGE as error:
            yield damage(unit.path, error, at, "rows", unit.compression, "the rest of the file")

    def _delimiter(head):
        found = [d for d in DELIMITERS if text_field in next(csv.reader([head], delimiter=d), [])]
        return found[0] if found else "\t" if ".tsv" in os.path.basename(unit.path) else ","

    with open_content(unit.path, unit.compression) as (stream, file):
        # Held here: it closes the stream when nothing refers to it any more.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        lines = _Lines(text)
        position = file.tell if unit.compression else lambda: lines.bytes
        yield from tasks_of_rows(unit, "rows", rows(lines, position), piece_bytes, lambda: began)


class _Lines:
    """Lines of a text, with the bytes of those that were read."""

    def __init__(self, text):
        self._text, self.bytes = text, 0

    def readline(self, size=-1) -> str:
        line = self._text.readline(size)
        self.bytes += len(line.encode(errors="surrogateescape"))
        return line

    def __iter__(self):
        return iter(self.readline, "")


def _in_words(error) -> str:
    """What csv found wrong, for people."""
    if "unexpected end" in str(error):
        return "a quote opens here that nothing closes"
    if "expected after" in str(error):
        return f"a quote inside a field must be doubled ({error})"
    return str(error)


def _disk(path):
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path))  # as bytes: a name need not be UTF-8


def _check_column(path, schema, text_field) -> Problem | None:
    import pyarrow.types as types

    index = schema.get_field_index(text_field)  # -1 also where several have the name
    if index < 0:
        return _no_text(path, text_field, schema.names)
    kind = schema.field(index).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    known = types.is_string, types.is_large_string, types.is_string_view
    if any(is_known(inner) for is_known in (*known, types.is_binary, types.is_large_binary)):
        return None
    return _no_text(path, text_field, (), wrong_type=str(kind)[:NAME_SHOWN])


def _contents(array) -> list:
    """The bytes of each text of a column, or None; what is not UTF-8 is found later."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array.validate(full=True)  # a damaged index would read past the end
        array = array.dictionary_decode()
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = array.view(pa.binary() if pa.types.is_string(array.type) else pa.large_binary())
    array.validate(full=True)
    return array.to_pylist()

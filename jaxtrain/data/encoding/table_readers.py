"""Reads documents out of tables, a few rows at a time: parquet, Arrow IPC and CSV."""

import csv
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxtrain.data.encoding.formats import DAMAGE, DOCUMENT_BYTES, open_content
from jaxtrain.data.encoding.work_units import (
    BadDocument,
    DocumentProblem,
    Row,
    Task,
    Unit,
    damage_problem,
    group_rows,
)

BATCH_BYTES = 8 << 20  # of text decoded at once, estimated from the average length of a row
BATCH_ROWS = 4096
DELIMITERS = (",", "\t", ";", "|")
MAX_COLUMNS, MAX_NAME = 20, 40  # listed in a message: columns; characters of a name


def _no_text_problem(
    path: str, text_field: str, columns: Iterable[str], wrong_type: str = ""
) -> DocumentProblem:
    """Returns the problem of a table that has no column of text called `text_field`."""
    columns = list(columns)
    names = ", ".join(repr(str(name)[:MAX_NAME]) for name in columns[:MAX_COLUMNS])
    if len(columns) > MAX_COLUMNS:
        names += f" and {len(columns) - MAX_COLUMNS} more"
    found = f"{wrong_type} in it" if wrong_type else names or "no column"
    reason = f"without a string {text_field!r}"
    text = f"expected a column {text_field!r} of text; found {found}"
    return DocumentProblem(path, "", "", 0, reason, text)


def parquet_units(path: str, name: str, size: int, text_field: str) -> list[Unit]:
    """Returns a unit for each row group, or one with the reason why the file cannot be used."""
    import pyarrow.parquet as pq  # takes 0.3 s

    try:
        with _open(path) as file:
            table = pq.ParquetFile(file, page_checksum_verification=True)
            rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            problem = _check_column(path, table.schema_arrow, text_field)
    except Exception as error:  # damage is an OSError, a ValueError, or pyarrow's own
        return [Unit("problem", size, problem=damage_problem(path, error))]
    if problem:
        return [Unit("problem", size, problem=problem)]
    firsts, total = itertools.accumulate(rows, initial=0), max(1, sum(rows))
    return [
        Unit("parquet", size * n // total, path=path, name=name, group=i, row=first)
        for i, (n, first) in enumerate(zip(rows, firsts, strict=False))
    ]


def read_parquet(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    """Yields the tasks of one row group, whose column is read page by page."""
    import pyarrow.parquet as pq

    read = count = 0

    def iter_rows(file) -> Iterator[Row | DocumentProblem]:
        nonlocal read, count
        try:
            # A small buffer and no pre_buffer: otherwise the whole column chunk is in memory.
            table = pq.ParquetFile(
                file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
            )
            group = table.metadata.row_group(unit.group)
            count = group.num_rows
            columns = map(group.column, range(group.num_columns))
            column = next(c for c in columns if c.path_in_schema == text_field)
            row_bytes = max(1, column.total_uncompressed_size // max(1, count))
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
            for batch in table.iter_batches(batch_rows, [unit.group], [text_field], False):
                for content in _text_bytes(batch.column(0)):
                    yield unit.row + read, content
                    read += 1
        except Exception as error:  # a missing group or column: the file has changed since
            what = f"the rest of row group {unit.group}"
            yield damage_problem(unit.path, error, unit.row + read, "rows", what=what)

    with _open(unit.path) as file:
        position = lambda: unit.size * read // max(1, count)
        yield from group_rows(unit, "rows", iter_rows(file), piece_bytes, position)


def read_arrow(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    """Yields the tasks of an Arrow IPC file or stream; one record batch is in memory at a time."""
    import pyarrow as pa

    def iter_rows(file) -> Iterator[Row | DocumentProblem]:
        row = 0
        try:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader: Any = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file)
            problem = _check_column(unit.path, reader.schema, text_field)
            if problem:
                yield problem
                return
            column = reader.schema.get_field_index(text_field)
            batches = reader
            if is_file:
                batches = map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                array = batch.column(column)
                step = max(1, BATCH_BYTES // max(1, array.nbytes // max(1, len(array))))
                for start in range(0, len(array), step):
                    for content in _text_bytes(array.slice(start, step)):
                        yield row, content
                        row += 1
        except Exception as error:
            yield damage_problem(unit.path, error, row, "rows", what="the rest of the file")

    with _open(unit.path) as file:
        yield from group_rows(unit, "rows", iter_rows(file), piece_bytes, file.tell)


def read_csv(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    """Yields the tasks of a CSV file, whose first record names the columns.

    A record with more or fewer fields than the header is a bad document. After a misplaced quote
    the rest of the file is lost, because it is unknown where the next record begins.
    """
    record_start = 0  # of the current record: if it is unreadable, all from here on is lost

    def iter_rows(
        text: _CountedLines, position: Callable[[], int]
    ) -> Iterator[Row | DocumentProblem]:
        nonlocal record_start
        csv.field_size_limit(DOCUMENT_BYTES)
        row = 0
        try:
            head = text.readline(DOCUMENT_BYTES)
            lines = itertools.chain([head], text)
            records = csv.reader(lines, delimiter=find_delimiter(head), strict=True)
            header = next(records, [])
            if header.count(text_field) != 1:
                yield _no_text_problem(unit.path, text_field, header)
                return
            column = header.index(text_field)
            record_start = position()
            for row, record in enumerate(records, start=1):
                if len(record) == len(header):
                    yield row, record[column].encode(errors="surrogateescape")
                elif record:
                    amount = "many" if len(record) > len(header) else "few"
                    found = f"expected {len(header)} fields; found {len(record)}"
                    yield row, BadDocument(f"with too {amount} fields", found)
                record_start = position()
        except csv.Error as error:
            location, what = (row + 1, "rows", unit.compression), "the file from this row on"
            yield damage_problem(unit.path, _explain(error), *location, what)
        except DAMAGE as error:
            location, what = (row, "rows", unit.compression), "the rest of the file"
            yield damage_problem(unit.path, error, *location, what)

    def find_delimiter(head: str) -> str:
        for delimiter in DELIMITERS:
            if text_field in next(csv.reader([head], delimiter=delimiter), []):
                return delimiter
        return "\t" if ".tsv" in os.path.basename(unit.path) else ","

    with open_content(unit.path, unit.compression) as (stream, file):
        # In a variable, because an unreferenced TextIOWrapper would close the stream below it.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        lines = _CountedLines(text)
        position = file.tell if unit.compression else lambda: lines.bytes
        rows = iter_rows(lines, position)
        yield from group_rows(unit, "rows", rows, piece_bytes, lambda: record_start)


class _CountedLines:
    """The lines of a text, with a count of the bytes read so far."""

    def __init__(self, text: io.TextIOWrapper):
        self._text, self.bytes = text, 0

    def readline(self, size: int = -1) -> str:
        line = self._text.readline(size)
        self.bytes += len(line.encode(errors="surrogateescape"))
        return line

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")


def _explain(error: csv.Error) -> csv.Error:
    """Returns an error that explains in plain words what is wrong with the quotes."""
    if "unexpected end" in str(error):
        return csv.Error("a quote opens here that nothing closes")
    if "expected after" in str(error):
        return csv.Error(f"a quote inside a field must be doubled ({error})")
    return error


def _open(path: str):
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path))  # as bytes: a name need not be UTF-8


def _check_column(path: str, schema: Any, text_field: str) -> DocumentProblem | None:
    import pyarrow.types as types

    index = schema.get_field_index(text_field)  # -1 also if several columns have the name
    if index < 0:
        return _no_text_problem(path, text_field, schema.names)
    column_type = schema.field(index).type
    inner = column_type.value_type if types.is_dictionary(column_type) else column_type
    strings = types.is_string, types.is_large_string, types.is_string_view
    if any(is_text(inner) for is_text in (*strings, types.is_binary, types.is_large_binary)):
        return None
    return _no_text_problem(path, text_field, (), wrong_type=str(column_type)[:MAX_NAME])


def _text_bytes(array: Any) -> list[bytes | None]:
    """Returns the bytes of each text in a column; whether they are UTF-8 is checked later."""
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

"""Cuts each unit of the input into tasks of about a megabyte, in order."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from jaxtrain.data.encoding.cut_points import CONTEXT_BYTES, cut_text
from jaxtrain.data.encoding.documents import TOO_LONG
from jaxtrain.data.encoding.formats import (
    BOM,
    DAMAGE,
    DOCUMENT_BYTES,
    HEAD_BYTES,
    iter_bytes,
    open_content,
    printable_path,
)
from jaxtrain.data.encoding.table_readers import read_arrow, read_csv, read_parquet
from jaxtrain.data.encoding.work_units import (
    DocumentProblem,
    Piece,
    Row,
    Task,
    Unit,
    damage_problem,
    group_rows,
)
from jaxtrain.data.tokenizer import Tokenizer

JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)
QUOTE, OPENING_BRACKET = b'"['
OPENING, CLOSING = b"[{", b"]}"
EXPECTED_JSON = "expected an array or an object"


def read_unit(
    unit: Unit, text_field: str, piece_bytes: int, tokenizer: Tokenizer
) -> Iterator[Task]:
    """Yields the tasks of a unit; what cannot be read becomes a task with a problem.

    Args:
        tokenizer: decides where a compressed text is cut.
    """
    try:
        if unit.kind == "text":
            yield from _read_text(unit, piece_bytes, tokenizer)
        else:
            yield from READERS[unit.kind](unit, text_field, piece_bytes)
    except DAMAGE as error:  # the file could be read when the input was divided
        yield Task((), 0, damage_problem(unit.path, error))


def _read_pieces(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    yield Task(unit.pieces, unit.size)


def _read_problem(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    yield Task((), 0, unit.problem)


def _read_text(unit: Unit, piece_bytes: int, tokenizer: Tokenizer) -> Iterator[Task]:
    """Reads a compressed text: the whole, or its training part and then its held-out part."""
    where, kept, buffer, read_before = printable_path(unit.path), 0, b"", 0
    with open_content(unit.path, unit.compression) as (stream, file):

        def read(start: int, stop: int) -> bytes:
            """Returns bytes of the text, which must not begin before the first one kept."""
            nonlocal buffer
            buffer += b"".join(iter_bytes(stream, max(0, stop - kept - len(buffer))))
            if len(buffer) < stop - kept:
                raise EOFError(f"it had {stop:,} bytes of text or more, and now has fewer")
            return buffer[start - kept : stop - kept]

        for text in unit.pieces:
            parts = cut_text(read, text.start, text.stop, piece_bytes, tokenizer, where)
            for part in parts:
                content = read(part.start - part.before, part.stop + part.after)
                first = text.first and part.start == text.start
                piece = replace(text, **part._asdict(), first=first, content=content)
                yield Task((piece,), file.tell() - read_before)
                read_before = file.tell()
                drop = max(0, part.stop - CONTEXT_BYTES - kept)
                kept, buffer = kept + drop, buffer[drop:]


def _read_jsonl(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    """Reads compressed JSON lines as blocks of whole lines, which worker processes parse."""
    kind = "jsonl"
    with open_content(unit.path, unit.compression) as (stream, file):
        start = read_before = 0  # start of the block, in the content and on disk
        chunks: list[bytes] = []
        size = end = 0  # of the chunks: all bytes, and those up to the last newline
        skipping = False  # whether a line that is too long has not ended yet

        def make_task(stop: int) -> tuple[Task, list[bytes]]:
            """Returns a task with the chunks up to `stop`, and the rest of the chunks."""
            content = b"".join(chunks)
            location = unit.path, unit.name, start, start + stop, kind, unit.compression
            piece = Piece(*location, content=content[:stop])
            return Task((piece,), file.tell() - read_before), [content[stop:]]

        try:
            for chunk in iter_bytes(stream):
                if skipping:
                    stop = chunk.find(b"\n") + 1
                    start += stop or len(chunk)
                    skipping, chunk = not stop, chunk[stop:] if stop else b""
                chunks.append(chunk)
                if newline := chunk.rfind(b"\n") + 1:
                    end = size + newline
                size += len(chunk)
                if end and size >= min(piece_bytes, DOCUMENT_BYTES):
                    task, chunks = make_task(end)
                    yield task
                    start, read_before, size, end = start + end, file.tell(), size - end, 0
                elif size > DOCUMENT_BYTES:
                    location = unit.path, kind, unit.compression, start
                    yield Task((), 0, DocumentProblem(*location, *TOO_LONG))
                    start, chunks, size, skipping = start + size, [], 0, True
        except DAMAGE as error:
            if end:
                yield make_task(end)[0]
            what = "the rest of the file"
            problem = damage_problem(unit.path, error, start + end, kind, unit.compression, what)
            yield Task((), 0, problem)
            return
        if size:
            yield make_task(size)[0]


def _read_json(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    with open_content(unit.path, unit.compression) as (stream, file):
        elements = _iter_elements(unit, stream)
        yield from group_rows(unit, "json", elements, piece_bytes, file.tell)


def _iter_elements(unit: Unit, stream: Any) -> Iterator[Row | DocumentProblem]:
    """Yields (place, bytes) of each document in a file of JSON values one after the other.

    A document is an object, or an element of an array. Anything else between them is yielded too,
    and is later reported as not JSON. Only brackets and strings are recognised here; worker
    processes parse the documents.
    """

    def problem(place: int, reason: str, found: str) -> DocumentProblem:
        return DocumentProblem(unit.path, "json", unit.compression, place, reason, found)

    data = b""  # content that is not yet yielded
    offset = 0  # of data[0] in the file
    scanned = begin = 0  # offsets in data: end of the last token, start of the next document
    depth = 0  # open brackets
    base = 0  # the depth at which documents begin: 1 in an array, else 0
    while True:
        try:
            chunk = b"".join(iter_bytes(stream, max(HEAD_BYTES, len(data))))
        except DAMAGE as error:
            location, what = (offset + scanned, "json", unit.compression), "the rest of the file"
            yield damage_problem(unit.path, error, *location, what)
            return
        data += chunk
        if not offset and not scanned and data.startswith(BOM):
            scanned = begin = len(BOM)
        for match in JSON_TOKEN.finditer(data, scanned):
            start, scanned = match.span()
            token = data[start]
            if token == QUOTE and scanned == start + 1:  # a string that ends in a later chunk
                scanned = start
                break
            if depth == 0:
                if token not in OPENING:
                    yield problem(offset + start, "not JSON", f"{EXPECTED_JSON}; found neither")
                    return
                base = int(token == OPENING_BRACKET)
            if depth <= base and (stray := data[begin:start].strip(b" \t\r\n,")):
                yield offset + data.index(stray, begin), stray
            if token in OPENING:
                if depth <= base:  # a document begins here, or after the bracket of an array
                    begin = start if depth == base else scanned
                depth += 1
            elif token in CLOSING:
                depth -= 1
                begin = scanned if depth < base else begin
            if depth == base and token not in OPENING:
                first = start if token == QUOTE else begin
                yield offset + first, data[first:scanned]
                begin = scanned
        else:
            scanned = len(data)
        data, offset, scanned, begin = data[begin:], offset + begin, scanned - begin, 0
        if not chunk:
            if depth or data.strip():
                found = "no closing bracket" if depth else "something after it"
                yield problem(offset, "not JSON", f"{EXPECTED_JSON}; found {found}")
            return
        if len(data) > DOCUMENT_BYTES:
            yield problem(offset, *TOO_LONG)
            return


READERS: dict[str, Callable[[Unit, str, int], Iterator[Task]]] = {
    "pieces": _read_pieces,
    "problem": _read_problem,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}

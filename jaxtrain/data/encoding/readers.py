"""Readers: each cuts a unit of the input into tasks of about a megabyte, in order."""

import re
from collections.abc import Iterator
from dataclasses import replace

from jaxtrain.data.encoding.cut_points import WINDOW_BYTES, cut_in_window
from jaxtrain.data.encoding.documents import TOO_LONG, Piece, Problem
from jaxtrain.data.encoding.formats import (
    BOM,
    DAMAGE,
    DOCUMENT_BYTES,
    HEAD_BYTES,
    iter_bytes,
    open_content,
)
from jaxtrain.data.encoding.table_readers import read_arrow, read_csv, read_parquet
from jaxtrain.data.encoding.work_units import Task, Unit, damage, tasks_of_rows

TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)


def read_unit(unit: Unit, text_field: str, piece_bytes: int) -> Iterator[Task]:
    """Yields the tasks of a unit; what cannot be read becomes a task with a problem."""
    try:
        yield from READERS[unit.kind](unit, text_field, piece_bytes)
    except DAMAGE as error:  # the file was whole when the units were planned
        yield Task((), 0, damage(unit.path, error))


def _read_pieces(unit, text_field, piece_bytes):
    yield Task(unit.pieces, unit.size)


def _read_problem(unit, text_field, piece_bytes):
    yield Task((), 0, unit.problem)


def _read_text(unit, text_field, piece_bytes):
    """A compressed text, whose parts (one, or the trained and the held-out one) are known."""
    with open_content(unit.path, unit.compression) as (stream, file):
        before, kept = 0, b""
        for _ in iter_bytes(stream, unit.pieces[0].start):
            pass  # a BOM
        for part in unit.pieces:
            at = part.start
            while at < part.stop:
                wanted = min(piece_bytes + WINDOW_BYTES, part.stop - at)
                kept += b"".join(iter_bytes(stream, max(0, wanted - len(kept))))
                if len(kept) < wanted:
                    raise EOFError(f"it had {part.stop:,} bytes of text, and now has fewer")
                size = part.stop - at
                if size > piece_bytes:
                    size = piece_bytes + cut_in_window(kept[piece_bytes:wanted])
                first = part.first and at == part.start
                piece = replace(part, start=at, stop=at + size, first=first, content=kept[:size])
                yield Task((piece,), file.tell() - before)
                before, kept, at = file.tell(), kept[size:], at + size


def _read_jsonl(unit, text_field, piece_bytes):
    """A compressed .jsonl file: blocks of whole lines, which the processes parse."""
    place = unit.path, "jsonl", unit.compression
    with open_content(unit.path, unit.compression) as (stream, file):
        at, before, kept, size, end, skipping = 0, 0, [], 0, 0, False

        def block(stop):
            content = b"".join(kept)
            piece = Piece(unit.path, unit.name, at, at + stop, *place[1:], content=content[:stop])
            return Task((piece,), file.tell() - before), [content[stop:]]

        try:
            for chunk in iter_bytes(stream):
                if skipping:  # the rest of a line that is too long
                    stop = chunk.find(b"\n") + 1
                    at += stop or len(chunk)
                    skipping, chunk = not stop, chunk[stop:] if stop else b""
                kept.append(chunk)
                if newline := chunk.rfind(b"\n") + 1:
                    end = size + newline  # of the whole lines in `kept`
                size += len(chunk)
                if end and size >= min(piece_bytes, DOCUMENT_BYTES):
                    task, kept = block(end)
                    yield task
                    at, before, size, end = at + end, file.tell(), size - end, 0
                elif size > DOCUMENT_BYTES:
                    yield Task((), 0, Problem(*place, at, *TOO_LONG))
                    at, kept, size, skipping = at + size, [], 0, True
        except DAMAGE as error:
            if end:
                yield block(end)[0]
            what = "the rest of the file"
            yield Task((), 0, damage(*place[:1], error, at + end, *place[1:], what))
            return
        if size:
            yield block(size)[0]


def _read_json(unit, text_field, piece_bytes):
    with open_content(unit.path, unit.compression) as (stream, file):
        elements = _elements(unit, stream)
        yield from tasks_of_rows(unit, "json", elements, piece_bytes, file.tell)


def _elements(unit, stream):
    """(place, bytes) of each object, or element of an array, of values one after the other.

    What stands between them is an element too, which is then no JSON. Only brackets and strings
    are looked at; the processes parse the elements.
    """
    place = unit.path, "json", unit.compression
    data, at, scanned, begin, depth = b"", 0, 0, 0, 0  # at: the place of data[0]
    base = 0  # the depth at which elements begin: 1 in an array
    while True:
        try:
            chunk = b"".join(iter_bytes(stream, max(HEAD_BYTES, len(data))))
        except DAMAGE as error:
            yield damage(unit.path, error, at + scanned, *place[1:], "the rest of the file")
            return
        data += chunk
        if not at and not scanned and data.startswith(BOM):
            scanned = begin = len(BOM)
        for match in TOKEN.finditer(data, scanned):
            start, scanned = match.span()
            token = data[start]
            if token == QUOTE and scanned == start + 1:  # a string that ends in a later chunk
                scanned = start
                break
            if depth == 0:
                if token not in OPENING:
                    yield Problem(*place, at + start, "not JSON", f"{EXPECTED}; found neither")
                    return
                base = int(token == OPENED)
            if depth <= base and (stray := data[begin:start].strip(b" \t\r\n,")):
                yield at + data.index(stray, begin), stray
            if token in OPENING:
                if depth <= base:
                    begin = start if depth == base else scanned  # of an element; of the array
                depth += 1
            elif token in CLOSING:
                depth -= 1
                begin = scanned if depth < base else begin
            if depth == base and token not in OPENING:
                first = start if token == QUOTE else begin
                yield at + first, data[first:scanned]
                begin = scanned
        else:
            scanned = len(data)
        data, at, scanned, begin = data[begin:], at + begin, scanned - begin, 0
        if not chunk:
            if depth or data.strip():
                found = "no end of it" if depth else "something behind it"
                yield Problem(*place, at, "not JSON", f"{EXPECTED}; found {found}")
            return
        if len(data) > DOCUMENT_BYTES:
            yield Problem(*place, at, *TOO_LONG)
            return


QUOTE, OPENED = b'"['
EXPECTED = "expected an array or an object"
OPENING, CLOSING = b"[{", b"]}"

READERS = {
    "pieces": _read_pieces,
    "problem": _read_problem,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}

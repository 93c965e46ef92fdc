"""File formats of text: which one a file has, by its content, and how its bytes are read.

    text              UTF-8; the file is a document
    jsonl             a JSON object a line
    json              JSON values one after the other: objects, and arrays of objects or strings
    csv               comma- or tab-separated values with a header; known by its suffix alone
    parquet, arrow    tables; arrow is IPC, as a file or as a stream

The first four may be compressed by gzip or zstd, in any number of members or frames.
"""

import contextlib
import gzip
import io
import json
import os
import re
import zlib
from typing import NamedTuple

HEAD_BYTES = 1 << 16  # that a format is recognised by
DOCUMENT_BYTES = 256 << 20  # longest line, array element or CSV field that is read into memory
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = {"gzip": (".gz", ".gzip", ".bgz"), "zstd": (".zst", ".zstd")}
TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
UNSUPPORTED = {
    b"PARE": "encrypted parquet",
    b"BZh91AY&SY": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"7z\xbc\xaf\x27\x1c": "7z archives",
    b"PK\x03\x04": "zip archives",
}
BOM = b"\xef\xbb\xbf"
UTF16 = b"\xff\xfe", b"\xfe\xff"  # their marks of the byte order
ARRAY_OF_OBJECTS = re.compile(rb'\[\s*\{\s*"')
OBJECT = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:')
SPACE = re.compile(r"[ \t\r\n]*")
NO_FIELD = "JSON without the text field"
NUMBERS = re.compile(rb"\[\s*[-\d]")
CUT_VALUE = 16  # characters of a number, literal or escape that the end of the head may cut
DAMAGE = (OSError, EOFError, zlib.error)  # what reading a compressed file raises


class Format(NamedTuple):
    """How a file's documents are stored; `skip` says why there are none, or is ""."""

    kind: str
    compression: str = ""
    skip: str = ""


def shown(path) -> str:
    """Returns a path for people; bytes that are not UTF-8 are escaped, so it always prints."""
    return os.fsencode(path).decode(errors="backslashreplace")


def detect(path: str, text_field: str = "text") -> Format:
    """Finds a file's format by its first bytes; the suffix only where content leaves a choice.

    Args:
        text_field: what objects of JSON hold their text under; without it a file is skipped.

    Raises:
        OSError, EOFError, zlib.error: the file cannot be read, or its compression is damaged.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return Format("text", skip="empty")
    for table, kind in TABLES.items():
        if head.startswith(table):
            return Format(kind)
    for signature, what in UNSUPPORTED.items():
        if head.startswith(signature):
            return Format("text", skip=what)
    compression, name = _compression(head), os.fspath(path).lower()
    if compression:
        with open_content(path, compression) as (stream, _):
            head = b""
            while len(head) < HEAD_BYTES and (chunk := stream.read1(HEAD_BYTES)):
                head += chunk
        for suffix in SUFFIXES[compression]:
            name = name.removesuffix(suffix)
        if not head:
            return Format("text", compression, "empty")
        if head.startswith(tuple(TABLES)):
            return Format("text", compression, f"tables compressed by {compression}")
    if head.startswith(UTF16) and b"\0" in head:
        return Format("text", compression, "UTF-16 text")
    if head[257:262] == b"ustar":
        return Format("text", compression, "tar archives")
    kind = _kind(head, os.path.splitext(name)[1])
    without = kind == "json" and not _may_hold_text(head, text_field)
    return Format(kind, compression, f"{NO_FIELD} {text_field!r}" * without)


def _compression(head) -> str:
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zstd"  # begins with a frame of the user's own data, as pzstd writes
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), "")


def _kind(head, suffix) -> str:
    start = head.removeprefix(BOM).lstrip()
    line, newline, _ = start.partition(b"\n")
    by_lines = suffix in (".jsonl", ".ndjson", ".jsonlines")
    if start[:1] == b"{":
        cut = not newline and len(head) >= HEAD_BYTES  # the first line goes on past the head
        if (OBJECT.match(line) if cut else _is_object(line)) or by_lines:
            return "jsonl"
        if _values(head) is not None:
            return "json"
    elif start[:1] == b"[":
        if not by_lines and (suffix == ".json" or ARRAY_OF_OBJECTS.match(start)):
            return "json"
        if by_lines and ARRAY_OF_OBJECTS.match(start) and not _is_json(line):
            return "json"
        if not by_lines and _values(head) is not None:
            return "json"
    if by_lines:
        return "jsonl"
    return "csv" if suffix in (".csv", ".tsv") else "text"


def _values(head) -> list | None:
    """The JSON values that a file begins with, or None if it does not hold values alone.

    The last one may go on behind the head.
    """
    text = head.removeprefix(BOM).decode(errors="replace")
    decoder, values, at = json.JSONDecoder(), [], 0
    while (at := SPACE.match(text, at).end()) < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except RecursionError:
            return None
        except ValueError as error:
            cut = len(head) >= HEAD_BYTES and isinstance(error, json.JSONDecodeError)
            at_end = cut and ("Unterminated" in error.msg or error.pos > len(text) - CUT_VALUE)
            return values if at_end else None
        values.append(value)
    return values


def _may_hold_text(head, text_field) -> bool:
    """Whether JSON may hold documents: objects with the field, or arrays of objects or strings."""
    values = _values(head)
    if values is None or (not values and len(head) < HEAD_BYTES):
        return True  # damaged: the reader says where
    for value in values:
        inside = value if isinstance(value, list) else []
        if any(isinstance(element, (dict, str, list)) for element in inside):
            return True
        if isinstance(value, dict) and text_field in value:
            return True
    if len(head) < HEAD_BYTES:
        return False
    start = head.removeprefix(BOM).lstrip()
    if start[:1] == b"[":
        return not NUMBERS.match(start)
    names = {json.dumps(text_field, ensure_ascii=ascii_only) for ascii_only in (True, False)}
    return any(name.encode(errors="replace") in head for name in names)


def _is_json(line) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_object(line) -> bool:
    return bool(OBJECT.match(line)) and _is_json(line)


@contextlib.contextmanager
def open_content(path: str, compression: str):
    """Opens a file's uncompressed bytes: (stream with read1, the file on disk for its position).

    Reading raises one of DAMAGE where the file or its compression is broken.
    """
    with open(path, "rb") as file:
        if not compression:
            yield file, file
        elif compression == "gzip":  # the standard library's also takes members padded with zeros
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream, file
        else:
            import pyarrow  # 0.3 s, for those who need it

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as stream:
                yield io.BufferedReader(stream, HEAD_BYTES), file


def read_at(path: str, compression: str, position: int, size: int) -> bytes:
    """Returns up to `size` bytes at a position of the uncompressed content."""
    with open_content(path, compression) as (stream, _):
        if not compression:
            stream.seek(position)
        else:
            for _ in iter_bytes(stream, position):
                pass
        return b"".join(iter_bytes(stream, size))


def iter_bytes(stream, size: int | None = None):
    """Yields chunks of a stream, up to `size` bytes or to its end."""
    while size is None or size > 0:
        chunk = stream.read1(HEAD_BYTES if size is None else min(size, HEAD_BYTES))
        if not chunk:
            return
        if size is not None:
            size -= len(chunk)
        yield chunk


def line_number(path: str, compression: str, position: int) -> int:
    """Returns the number, from 1, of the line that holds a byte of the uncompressed content."""
    with open_content(path, compression) as (stream, _):
        return 1 + sum(chunk.count(b"\n") for chunk in iter_bytes(stream, position))

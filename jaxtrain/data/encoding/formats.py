"""Recognises the format of an input file by its content and reads its uncompressed bytes.

    text              UTF-8; the file is a document
    jsonl             one JSON object per line
    json              JSON values one after the other: objects, and arrays of objects or strings
    csv               comma- or tab-separated values with a header; recognised by the suffix
    parquet, arrow    tables; arrow is Arrow IPC, as a file or as a stream

The first four may be compressed by gzip or zstd, in any number of members or frames.
"""

import contextlib
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

HEAD_BYTES = 1 << 16  # read from a file to recognise its format
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
UTF16_BOMS = b"\xff\xfe", b"\xfe\xff"
ARRAY_OF_OBJECTS = re.compile(rb'\[\s*\{\s*"')
BEGINS_OBJECT = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:')
SPACE = re.compile(r"[ \t\r\n]*")
NO_FIELD = "JSON without the text field"
ARRAY_OF_NUMBERS = re.compile(rb"\[\s*[-\d]")
MAX_CUT_CHARS = 16  # longest number, literal or escape that the end of the head may cut
DAMAGE = (OSError, EOFError, zlib.error)  # what reading a compressed file raises


class Format(NamedTuple):
    """How a file's documents are stored."""

    kind: str
    compression: str = ""
    skip: str = ""  # why the file has no documents


def printable_path(path: str | os.PathLike) -> str:
    """Returns a path for messages: bytes that are not UTF-8, newlines and the like are escaped."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def detect(path: str, text_field: str = "text") -> Format:
    """Detects a file's format by its first bytes, and by its suffix if they are ambiguous.

    Args:
        text_field: key of the text in JSON objects; JSON that does not have it is skipped.

    Raises:
        OSError, EOFError, zlib.error: the file cannot be read, or its compression is damaged.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return Format("text", skip="empty")
    for signature, kind in TABLES.items():
        if head.startswith(signature):
            return Format(kind)
    for signature, reason in UNSUPPORTED.items():
        if head.startswith(signature):
            return Format("text", skip=reason)
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
    if head.startswith(UTF16_BOMS) and b"\0" in head:
        return Format("text", compression, "UTF-16 text")
    if head[257:262] == b"ustar":
        return Format("text", compression, "tar archives")
    kind = _kind(head, os.path.splitext(name)[1])
    if kind == "json" and not _may_hold_text(head, text_field):
        return Format(kind, compression, f"{NO_FIELD} {text_field!r}")
    return Format(kind, compression)


def _compression(head: bytes) -> str:
    # A zstd file may begin with a skippable frame, 0x184D2A50 to 0x184D2A5F; pzstd writes one.
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zstd"
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), "")


def _kind(head: bytes, suffix: str) -> str:
    start = head.removeprefix(BOM).lstrip()
    line, newline, _ = start.partition(b"\n")
    named_jsonl = suffix in (".jsonl", ".ndjson", ".jsonlines")
    if start[:1] == b"{":
        line_is_cut = not newline and len(head) >= HEAD_BYTES
        line_is_object = BEGINS_OBJECT.match(line) if line_is_cut else _is_object(line)
        if line_is_object or named_jsonl:
            return "jsonl"
        if _parse_values(head) is not None:
            return "json"
    elif start[:1] == b"[":
        if named_jsonl:
            if ARRAY_OF_OBJECTS.match(start) and not _is_json(line):
                return "json"  # an array over several lines, despite the suffix
        elif suffix == ".json" or ARRAY_OF_OBJECTS.match(start) or _parse_values(head) is not None:
            return "json"
    if named_jsonl:
        return "jsonl"
    return "csv" if suffix in (".csv", ".tsv") else "text"


def _parse_values(head: bytes) -> list | None:
    """Returns the JSON values at the beginning of a file, or None if there is anything else.

    A last value that the end of the head cuts is not returned.
    """
    text = head.removeprefix(BOM).decode(errors="replace")
    decoder, values, position = json.JSONDecoder(), [], 0
    while (space := SPACE.match(text, position)) and space.end() < len(text):
        try:
            value, position = decoder.raw_decode(text, space.end())
        except RecursionError:
            return None
        except ValueError as error:
            if len(head) < HEAD_BYTES or not isinstance(error, json.JSONDecodeError):
                return None
            cut = "Unterminated" in error.msg or error.pos > len(text) - MAX_CUT_CHARS
            return values if cut else None
        values.append(value)
    return values


def _may_hold_text(head: bytes, text_field: str) -> bool:
    """Returns whether JSON may contain objects with the field, or arrays of objects or strings."""
    values = _parse_values(head)
    if values is None or (not values and len(head) < HEAD_BYTES):
        return True  # damaged: the reader reports where
    for value in values:
        if isinstance(value, dict) and text_field in value:
            return True
        if isinstance(value, list) and any(isinstance(v, (dict, str, list)) for v in value):
            return True
    if len(head) < HEAD_BYTES:
        return False
    start = head.removeprefix(BOM).lstrip()
    if start[:1] == b"[":
        return not ARRAY_OF_NUMBERS.match(start)
    names = {json.dumps(text_field, ensure_ascii=ascii_only) for ascii_only in (True, False)}
    return any(name.encode(errors="replace") in head for name in names)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_object(line: bytes) -> bool:
    return bool(BEGINS_OBJECT.match(line)) and _is_json(line)


@contextlib.contextmanager
def open_content(path: str, compression: str) -> Iterator[tuple[Any, IO[bytes]]]:
    """Opens a file for reading its uncompressed bytes.

    Reading raises one of DAMAGE if the file or its compression is broken.

    Yields:
        a stream with read1, and the file on disk, whose tell() shows the progress.
    """
    with open(path, "rb") as file:
        if not compression:
            yield file, file
        elif compression == "gzip":  # pyarrow's reader fails on zeros between members
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream, file
        else:
            import pyarrow  # takes 0.3 s

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as stream:
                yield io.BufferedReader(stream, HEAD_BYTES), file


def read_at(path: str, compression: str, position: int, size: int) -> bytes:
    """Returns up to `size` bytes of the uncompressed content, from a position on."""
    with open_content(path, compression) as (stream, _):
        if not compression:
            stream.seek(position)
        else:
            for _ in iter_bytes(stream, position):
                pass
        return b"".join(iter_bytes(stream, size))


def iter_bytes(stream: Any, size: int | None = None) -> Iterator[bytes]:
    """Yields chunks of a stream until `size` bytes are read or it ends."""
    while size is None or size > 0:
        chunk = stream.read1(HEAD_BYTES if size is None else min(size, HEAD_BYTES))
        if not chunk:
            return
        if size is not None:
            size -= len(chunk)
        yield chunk


def line_number(path: str, compression: str, position: int) -> int:
    """Returns the number, from 1, of the line that contains a byte of the uncompressed content."""
    with open_content(path, compression) as (stream, _):
        return 1 + sum(chunk.count(b"\n") for chunk in iter_bytes(stream, position))

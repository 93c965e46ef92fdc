"""Turns pieces of the input into tokens, document by document, inside an encoding process.

A document that cannot be used is counted with its reason and its place; it never ends the process.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxtrain.data.encoding.cut_points import WINDOW_BYTES, find_cut, find_cut_near_end
from jaxtrain.data.encoding.formats import BOM, DOCUMENT_BYTES, printable_path, read_at
from jaxtrain.data.encoding.held_out import SPLITS, ForcedSplit, Nearest, merge_nearest, unit_hash
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.roundtrip import LOST, ContainsEot, count_lost_bytes
from jaxtrain.data.encoding.work_units import (
    PIECE_BYTES,
    BadDocument,
    DocumentProblem,
    Piece,
    Row,
    first_line,
)
from jaxtrain.data.tokenizer import Tokenizer

LONG_BYTES = 8 * PIECE_BYTES  # a longer document is tokenized in parts, to bound the memory
REFUSED = "refused by the tokenizer"
TOO_LONG = BadDocument(
    "too long", f"a document must be at most {DOCUMENT_BYTES >> 20} MiB; found more"
)


@dataclass
class Encoded:
    """The documents of one task as tokens."""

    tokens: dict[str, np.ndarray]  # split -> the documents' tokens, end to end
    sizes: dict[str, list[tuple[int, int]]]  # split -> (tokens, text bytes) of each document
    documents: Counter = field(default_factory=Counter)  # that begin in this task, by split
    skipped: Counter = field(default_factory=Counter)  # by reason; excludes problems
    problems: list[DocumentProblem] = field(default_factory=list)
    lost_bytes: int = 0  # on disk, of pieces that can no longer be read
    nearest: Nearest = field(default_factory=dict)


def token_dtype(vocab_size: int) -> str:
    """Returns the smallest shard dtype that holds every id below vocab_size."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def encode_pieces(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    forced: ForcedSplit | None = None,
) -> Encoded:
    """Returns the documents as tokens; each document starts with eot.

    Raises:
        UnusableInput: the tokens of a document do not spell it.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {split: [np.empty(0, dtype)] for split in SPLITS}
    encoded = Encoded({}, {split: [] for split in SPLITS})
    for piece in pieces:
        for place, content in _read_documents(piece, options.text_field, encoded):
            if content == b"" or content is None:
                encoded.skipped["empty"] += 1
                continue
            parts = _assign_splits(piece, place, content, options.val_fraction, forced)
            for split, begins, part in parts:
                where = f"{printable_path(piece.path)}, {piece.kind} {place}"
                ids = _tokenize(part, tokenizer, where, encoded)
                if isinstance(ids, BadDocument):
                    location = piece.path, piece.kind, piece.compression, place
                    encoded.problems.append(DocumentProblem(*location, *ids))
                    if not (piece.kind == "text" and begins):
                        continue
                    part, ids = b"", []  # the later pieces of the text still need its eot
                eot = np.full(int(begins), tokenizer.eot, dtype)
                tokens[split] += [eot, np.asarray(ids, dtype)]
                encoded.sizes[split].append((len(eot) + len(ids), len(part)))
                encoded.documents[split] += int(begins)
                if piece.kind != "text":
                    document = unit_hash(f"{piece.name}:{place}"), piece.name, place
                    merge_nearest(encoded.nearest, {split: document})
    encoded.tokens = {split: np.concatenate(arrays) for split, arrays in tokens.items()}
    return encoded


def _assign_splits(
    piece: Piece,
    place: int,
    content: bytes | BadDocument,
    val_fraction: float,
    forced: ForcedSplit | None,
) -> list[tuple[str, bool, bytes | BadDocument]]:
    """Returns (split, whether a document begins, content) of each part of a document.

    There is one part, unless the only document of the input is cut to fill both splits.
    """
    if piece.kind == "text":
        return [(piece.split, piece.first, content)]
    if forced is None or (forced.name, forced.place) != (piece.name, place):
        held_out = unit_hash(f"{piece.name}:{place}") < val_fraction
        return [("val" if held_out else "train", True, content)]
    if forced.split != "cut" or isinstance(content, BadDocument):
        return [(forced.split, True, content)]
    cut = find_cut_near_end(content, max(1, round(val_fraction * len(content))))
    parts = ("train", True, content[:cut]), ("val", True, content[cut:])
    return [part for part in parts if part[2]]


def _tokenize(
    content: bytes | BadDocument, tokenizer: Tokenizer, where: str, encoded: Encoded
) -> np.ndarray | BadDocument:
    """Returns a document's token ids; counts in `encoded` the bytes that they lose."""
    ids = content if isinstance(content, BadDocument) else _encode_text(content, tokenizer)
    if isinstance(ids, BadDocument) or isinstance(content, BadDocument):
        return ids
    try:
        if lost := count_lost_bytes(tokenizer, content.decode(), ids, where):
            encoded.skipped[LOST] += lost
        return ids
    except ContainsEot as error:
        return BadDocument(REFUSED, first_line(error).removeprefix(f"{where}: "))


def _encode_text(content: bytes, tokenizer: Tokenizer) -> np.ndarray | BadDocument:
    if b"\0" in content:
        return BadDocument("holding NUL bytes", "the text contains a NUL character")
    try:
        if len(content) <= LONG_BYTES:
            return tokenizer.encode(content.decode())
        parts, start = [], 0
        while start < len(content):
            stop = start + PIECE_BYTES
            if stop < len(content):
                stop += find_cut(content[stop : stop + WINDOW_BYTES])
            parts.append(tokenizer.encode(content[start:stop].decode()))
            start = stop
        return np.concatenate(parts)
    except UnicodeDecodeError as error:
        return BadDocument("not UTF-8", f"the text is not UTF-8: {error}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic in `tokenizers` is not an Exception
        return BadDocument(REFUSED, f"the tokenizer failed: {first_line(error)}")


def _read_documents(piece: Piece, text_field: str, encoded: Encoded) -> Iterator[Row]:
    """Yields (place, content) of each document in a piece; a piece of a text is yielded whole."""
    try:
        if piece.kind == "rows":
            yield from piece.rows()
        elif piece.kind == "json":
            for place, element in piece.rows():
                if isinstance(element, bytes):
                    yield place, _parse_text(element, text_field, strings=True)
        elif piece.kind == "jsonl":
            for place, line in _read_lines(piece):
                content = _parse_text(line, text_field) if isinstance(line, bytes) else line
                yield place, content
        else:
            yield piece.start, _read_bytes(piece)
    except (OSError, EOFError) as error:  # the file could be read when the input was divided
        encoded.lost_bytes += piece.stop - piece.start
        reason = getattr(error, "strerror", None) or first_line(error)
        yield piece.start, BadDocument("unreadable", f"the file cannot be read: {reason}")


def _read_bytes(piece: Piece) -> bytes:
    if isinstance(piece.content, bytes):
        return piece.content
    content = read_at(piece.path, piece.compression, piece.start, piece.stop - piece.start)
    _check_end(piece, piece.start + len(content))
    return content


def _check_end(piece: Piece, end: int) -> None:
    if end < piece.stop:
        raise EOFError(f"it had {piece.stop:,} bytes or more, and now ends at byte {end:,}")


def _read_lines(piece: Piece) -> Iterator[tuple[int, bytes | BadDocument]]:
    """Yields (place, line) of each line that is not blank."""
    if piece.stop - piece.start > DOCUMENT_BYTES:
        yield from _read_long_lines(piece)
        return
    place = piece.start
    for line in _read_bytes(piece).split(b"\n"):
        if line.strip():
            yield place, line
        place += len(line) + 1


def _read_long_lines(piece: Piece) -> Iterator[tuple[int, bytes | BadDocument]]:
    """Yields the lines; one over DOCUMENT_BYTES is not stored, and becomes TOO_LONG."""
    with open(piece.path, "rb") as file:
        position = file.seek(piece.start)
        while position < piece.stop:
            line = file.readline(DOCUMENT_BYTES + 1)
            _check_end(piece, piece.stop if line else position)
            start, position = position, file.tell()
            if not line.endswith(b"\n") and len(line) > DOCUMENT_BYTES:
                while (rest := file.readline(PIECE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                position = file.tell()
                yield start, TOO_LONG
            elif line.strip():
                yield start, line


def _parse_text(
    content: bytes, text_field: str, strings: bool = False
) -> bytes | BadDocument | None:
    """Returns the text in a JSON object, or in a JSON string if `strings`; None for null."""
    expected = f"expected a JSON object with a string {text_field!r}"
    try:
        record = json.loads(content.removeprefix(BOM).decode())
    except RecursionError:
        return BadDocument("not JSON", f"{expected}; found JSON that is nested too deep")
    except UnicodeDecodeError as error:
        return BadDocument("not UTF-8", f"{expected}; found bytes that are not UTF-8: {error}")
    except ValueError as error:
        return BadDocument("not JSON", f"{expected}; found invalid JSON: {first_line(error)}")
    if strings and isinstance(record, str):
        record = {text_field: record}
    missing = f"without a string {text_field!r}"
    if not isinstance(record, dict):
        return BadDocument(missing, f"{expected}; found {type(record).__name__}")
    if text_field not in record:
        keys = ", ".join(map(repr, list(record)[:12]))
        found = f"the keys {keys}" if keys else "an empty object"
        return BadDocument(missing, f"{expected}; found {found}")
    text = record[text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        return BadDocument(missing, f"{expected}; found {type(text).__name__} under it")
    return text.encode(errors="surrogatepass")  # a lone surrogate is later refused as not UTF-8

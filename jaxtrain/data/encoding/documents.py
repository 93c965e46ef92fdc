"""Turns pieces of the input into tokens, document by document, inside an encoding process.

A document that cannot be used is counted with its reason and its place; it never ends the process.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from absl import logging

from jaxtrain.data.encoding.cut_points import (
    MAX_PIECES,
    Part,
    cut_text,
    find_cut_near_end,
    first_token_from,
)
from jaxtrain.data.encoding.formats import BOM, DOCUMENT_BYTES, printable_path, read_at
from jaxtrain.data.encoding.held_out import SPLITS, ForcedSplit, Nearest, merge_nearest, unit_hash
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.roundtrip import LOST, ContainsEot, UnusableInput, count_lost_bytes
from jaxtrain.data.encoding.work_units import (
    PIECE_BYTES,
    BadDocument,
    DocumentProblem,
    Piece,
    Row,
    first_line,
)
from jaxtrain.data.tokenizer import Tokenizer

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
                ids = _tokenize(part, piece, tokenizer, where, options.piece_bytes, encoded)
                if isinstance(ids, BadDocument):
                    location = piece.path, piece.kind, piece.compression, place
                    encoded.problems.append(DocumentProblem(*location, *ids))
                    if not (piece.kind == "text" and begins):
                        continue
                    part, ids = b"", []  # the later pieces of the text still need its eot
                eot = np.full(int(begins), tokenizer.eot, dtype)
                tokens[split] += [eot, np.asarray(ids, dtype)]
                text_bytes = len(part) - piece.before - piece.after if part else 0
                encoded.sizes[split].append((len(eot) + len(ids), text_bytes))
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
    content: bytes | BadDocument,
    piece: Piece,
    tokenizer: Tokenizer,
    where: str,
    piece_bytes: int,
    encoded: Encoded,
) -> np.ndarray | BadDocument:
    """Returns a document's token ids; counts in `encoded` the bytes that they lose.

    Args:
        content: of the document, or of a piece of a text with the text around it.
        piece_bytes: a much longer document is encoded in parts, to bound the memory.
    """
    if isinstance(content, BadDocument):
        return content
    if b"\0" in content:
        return BadDocument("holding NUL bytes", "the text contains a NUL character")
    first = piece.start - piece.before  # place of content[0] in the text
    parts = [Part(piece.start, piece.stop, piece.before, piece.after)]
    if piece.kind != "text":
        first, parts = 0, [Part(0, len(content), 0, 0)]
    try:
        if piece.kind != "text" and len(content) > MAX_PIECES * piece_bytes:
            content.decode()  # raises, before the parts are encoded, if it is not UTF-8
            read = lambda start, stop: content[start:stop]
            parts = cut_text(read, 0, len(content), piece_bytes, tokenizer, where)
        ids, lost = [], 0
        for part in parts:
            around = content[part.start - part.before - first : part.stop + part.after - first]
            part_ids, part_lost = _encode_part(around, part, tokenizer, where)
            ids.append(part_ids)
            lost += part_lost
    except UnicodeDecodeError as error:
        return BadDocument("not UTF-8", f"the text is not UTF-8: {error}")
    except (KeyboardInterrupt, SystemExit, UnusableInput):
        raise
    except ContainsEot as error:
        return BadDocument(REFUSED, first_line(error).removeprefix(f"{where}: "))
    except BaseException as error:  # a Rust panic in `tokenizers` is not an Exception
        return BadDocument(REFUSED, f"the tokenizer failed: {first_line(error)}")
    if lost:
        encoded.skipped[LOST] += lost
    return np.concatenate(ids)


def _encode_part(
    content: bytes, part: Part, tokenizer: Tokenizer, where: str
) -> tuple[np.ndarray, int]:
    """Returns the tokens of a part of a text, and how many of its bytes they lose.

    Args:
        content: the part with part.before and part.after bytes of the text around it.
    """
    text = content.decode()
    if not (part.before or part.after):
        ids = tokenizer.encode(text)
        return ids, count_lost_bytes(tokenizer, text, ids, where)
    start = len(content[: part.before].decode())
    stop = len(text) - len(content[len(content) - part.after :].decode())
    ids, spans = tokenizer.encode_with_spans(text)
    first, end = (first_token_from(spans, len(ids), place) for place in (start, stop))
    if first is None or end is None:  # possible with a Unigram model, see cut_points
        logging.warning(
            "%s: the tokens at byte %d depend on text further away; some tokens there may differ "
            "from those of the whole text",
            *(where, part.start if first is None else part.stop),
        )
        if first is None:
            return _encode_part(content[part.before :], part._replace(before=0), tokenizer, where)
        content = content[: len(content) - part.after]
        return _encode_part(content, part._replace(after=0), tokenizer, where)
    lost = count_lost_bytes(tokenizer, text, ids, where)
    if lost:  # count only those of the part
        for around in (text[:start], text[stop:]):
            lost -= count_lost_bytes(tokenizer, around, tokenizer.encode(around), where)
    return ids[first:end], max(0, lost)


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
    start, stop = piece.start - piece.before, piece.stop + piece.after
    content = read_at(piece.path, piece.compression, start, stop - start)
    _check_end(stop, start + len(content))
    return content


def _check_end(expected: int, end: int) -> None:
    if end < expected:
        raise EOFError(f"it had {expected:,} bytes or more, and now ends at byte {end:,}")


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
            _check_end(piece.stop, piece.stop if line else position)
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

"""Documents and their tokens: what an encoding process makes of the pieces that it is given.

A document that cannot be used is counted with its reason and its place; it never ends the process.
"""

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxtrain.data.encoding.cut_points import WINDOW_BYTES, cut_in_window, cut_near_end
from jaxtrain.data.encoding.formats import BOM, DAMAGE, DOCUMENT_BYTES, line_number, read_at, shown
from jaxtrain.data.encoding.held_out import draw, merge_drawn
from jaxtrain.data.encoding.roundtrip import LOST, HoldsStart, check_covers

PIECE_BYTES = 1 << 20
LONG_BYTES = 8 * PIECE_BYTES  # a longer document is tokenized in parts, to bound the memory
LINE_NUMBERS_BYTES = 1 << 30  # lines are counted up to there, to say where a document stands
PROBLEMS = 5  # described in full; all are counted
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes or rows of a file, which one process encodes."""

    path: str
    name: str  # path below the source, the same on every machine
    start: int
    stop: int
    kind: str = "text"  # text, jsonl, json or rows
    compression: str = ""
    split: str = "train"  # where a text goes; other documents are drawn one by one
    first: bool = True  # a text starts here
    content: bytes | list | None = None  # [(place, bytes)] of json and rows; None is in the file


class Forced(NamedTuple):
    """One document that goes to a split whatever its draw, so that no split is empty."""

    name: str
    at: int
    split: str  # "cut": its first part trains, its last is held out


class Options(NamedTuple):
    """What decides on the documents, beside the tokenizer."""

    text_field: str = "text"
    val_fraction: float = 0.0
    forced: Forced | None = None


class Bad(NamedTuple):
    """Why a document cannot be used: the category it is counted in, and what was found."""

    reason: str
    found: str


class Problem(NamedTuple):
    """A document, or the rest of a file, that could not be used."""

    path: str
    kind: str  # of the place: text, jsonl, json and damage are at a byte, rows at a row; "" none
    compression: str
    at: int
    reason: str
    found: str

    def describe(self) -> str:
        """Returns the file, the line or row, the byte, and what was found there."""
        place = shown(self.path)
        if self.kind == "rows":
            place += f", row {self.at:,}"
        elif self.kind:
            line = ""
            if self.kind == "jsonl" and self.at < LINE_NUMBERS_BYTES:
                with contextlib.suppress(*DAMAGE):
                    line = f"line {line_number(self.path, self.compression, self.at):,}, "
            place += f", {line}byte {self.at:,}"
        return f"{place}: {self.found}"


@dataclass
class Encoded:
    """What one process made of its pieces."""

    tokens: dict[str, np.ndarray]  # split -> the documents' tokens, end to end
    sizes: dict[str, list[tuple[int, int]]]  # split -> (tokens, text bytes) of each document
    documents: Counter = field(default_factory=Counter)  # that begin here, by split
    skipped: Counter = field(default_factory=Counter)  # without being an error, by reason
    problems: list[Problem] = field(default_factory=list)
    lost_bytes: int = 0  # on disk, of pieces that cannot be read any more
    drawn: dict = field(default_factory=dict)  # split -> (draw, name, at) nearest to the other


def token_dtype(vocab_size: int) -> str:
    """The shard dtype that holds every id below vocab_size."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def encode_pieces(pieces, tokenizer, options: Options) -> Encoded:
    """Returns the tokens of each document, with eot before its first.

    Raises:
        Refused: the tokens of a document do not stand for it.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    out = Encoded({s: [] for s in SPLITS}, {s: [] for s in SPLITS})
    for piece in pieces:
        for at, content in _contents(piece, options.text_field, out):
            if content == b"" or content is None:
                out.skipped["empty"] += 1
                continue
            for split, begins, part in _parts(piece, at, content, options):
                ids, lost = _tokenize(part, tokenizer, f"{shown(piece.path)}, {piece.kind} {at}")
                if isinstance(ids, Bad):
                    place = piece.path, piece.kind, piece.compression, at
                    out.problems.append(Problem(*place, *ids))
                    if not (piece.kind == "text" and begins):
                        continue
                    part, ids = b"", []  # the rest of the text still needs its eot
                elif lost:
                    out.skipped[LOST] += lost
                eot = np.full(int(begins), tokenizer.eot, dtype)
                out.tokens[split] += [eot, np.asarray(ids, dtype)]
                out.sizes[split].append((len(eot) + len(ids), len(part)))
                out.documents[split] += int(begins)
                _note_draw(out.drawn, piece, at, split)
    empty = [np.empty(0, dtype)]
    out.tokens = {split: np.concatenate(empty + arrays) for split, arrays in out.tokens.items()}
    return out


def _note_draw(drawn, piece, at, split) -> None:
    if piece.kind != "text":
        merge_drawn(drawn, {split: (draw(f"{piece.name}:{at}"), piece.name, at)})


def _parts(piece, at, content, options):
    """(split, whether a document begins, content) of a document, which may have to be cut."""
    if piece.kind == "text":
        return [(piece.split, piece.first, content)]
    forced = options.forced
    if forced is None or (forced.name, forced.at) != (piece.name, at):
        held_out = options.val_fraction and draw(f"{piece.name}:{at}") < options.val_fraction
        return [("val" if held_out else "train", True, content)]
    if forced.split != "cut" or isinstance(content, Bad):
        return [(forced.split, True, content)]
    cut = cut_near_end(content, max(1, round(options.val_fraction * len(content))))
    parts = ("train", True, content[:cut]), ("val", True, content[cut:])
    return [part for part in parts if part[2]]


def _tokenize(content, tokenizer, where):
    """(token ids of a document or why there are none, its bytes that they do not stand for)."""
    ids = content if isinstance(content, Bad) else _ids_of(content, tokenizer)
    if isinstance(ids, Bad):
        return ids, 0
    try:
        return ids, check_covers(tokenizer, content.decode(), ids, where)
    except HoldsStart as error:
        return Bad("refused by the tokenizer", first_line(error).removeprefix(f"{where}: ")), 0


def _ids_of(content, tokenizer):
    """Token ids of a document's bytes, or the Bad that says why there are none."""
    if b"\0" in content:
        return Bad("holding NUL bytes", "the text holds a NUL character")
    try:
        if len(content) <= LONG_BYTES:
            return tokenizer.encode(content.decode())
        parts, start = [], 0
        while start < len(content):
            stop = start + PIECE_BYTES
            if stop < len(content):
                stop += cut_in_window(content[stop : stop + WINDOW_BYTES])
            parts.append(tokenizer.encode(content[start:stop].decode()))
            start = stop
        return np.concatenate(parts)
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", f"the text is not UTF-8: {error}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust is not an Exception
        return Bad("refused by the tokenizer", f"the tokenizer failed: {first_line(error)}")


def first_line(error) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _contents(piece: Piece, text_field, out):
    """(place, bytes, None or Bad) of each document in the piece, or of the piece of one."""
    try:
        yield from _read_contents(piece, text_field)
    except (OSError, EOFError) as error:  # the file was whole when the pieces were planned
        out.lost_bytes += piece.stop - piece.start
        what = getattr(error, "strerror", None) or first_line(error)
        yield piece.start, Bad("unreadable", f"the file cannot be read: {what}")


def _read_contents(piece, text_field):
    if piece.kind == "rows":
        yield from piece.content
    elif piece.kind == "json":
        for at, raw in piece.content:
            yield at, _text_of(raw, text_field, strings=True)
    elif piece.kind == "jsonl":
        for at, line in _lines(piece):
            yield at, line if isinstance(line, Bad) else _text_of(line, text_field)
    else:
        yield piece.start, _bytes_of(piece)


def _bytes_of(piece) -> bytes:
    if piece.content is not None:
        return piece.content
    content = read_at(piece.path, piece.compression, piece.start, piece.stop - piece.start)
    _check_read(piece, piece.start + len(content))
    return content


def _check_read(piece, end) -> None:
    if end < piece.stop:
        raise EOFError(f"it had {piece.stop:,} bytes or more, and now ends at byte {end:,}")


def _lines(piece):
    """(place, line) of what is not blank; a line too long to be read is a Bad."""
    size = piece.stop - piece.start
    if size > DOCUMENT_BYTES:
        yield from _long_lines(piece)
        return
    at = piece.start
    for line in _bytes_of(piece).split(b"\n"):
        if line.strip():
            yield at, line
        at += len(line) + 1


def _long_lines(piece):
    with open(piece.path, "rb") as file:
        at = file.seek(piece.start)
        while at < piece.stop:
            line = file.readline(DOCUMENT_BYTES + 1)
            _check_read(piece, piece.stop if line else at)
            start, at = at, file.tell()
            if not line.endswith(b"\n") and len(line) > DOCUMENT_BYTES:
                while (rest := file.readline(PIECE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                at = file.tell()
                yield start, TOO_LONG
            elif line.strip():
                yield start, line


TOO_LONG = Bad("too long", f"it must be at most {DOCUMENT_BYTES >> 20} MiB; found more")


def _text_of(raw: bytes, text_field, strings=False):
    """The text of a JSON object, or of a JSON string where that is allowed, or Bad."""
    expected = f"expected a JSON object with a string {text_field!r}"
    try:
        record = json.loads(raw.removeprefix(BOM).decode())
    except RecursionError:
        return Bad("not JSON", f"{expected}; found JSON that is nested too deep")
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", f"{expected}; found bytes that are not UTF-8: {error}")
    except ValueError as error:
        return Bad("not JSON", f"{expected}; found no JSON: {first_line(error)}")
    if strings and isinstance(record, str):
        record = {text_field: record}
    missing = f"without a string {text_field!r}"
    if not isinstance(record, dict):
        return Bad(missing, f"{expected}; found {type(record).__name__}")
    if text_field not in record:
        keys = ", ".join(map(repr, list(record)[:12])) or "an empty object"
        return Bad(missing, f"{expected}; found {keys}")
    text = record[text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        return Bad(missing, f"{expected}; found {type(text).__name__} under it")
    return text.encode(errors="surrogatepass")  # a lone surrogate is then refused as not UTF-8

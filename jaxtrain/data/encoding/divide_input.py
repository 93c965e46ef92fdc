"""Which text is held out, and in what units the input is read.

Whole text files are held out, drawn by name up to val_fraction of the bytes; where no set of whole
files comes near that, the last part of the largest. Lines and rows are drawn one by one.
"""

import codecs
import os
from collections import Counter
from dataclasses import replace

from tqdm import tqdm

from jaxtrain.data.encoding.cut_points import WINDOW_BYTES, cut_in_window, cut_near_end
from jaxtrain.data.encoding.documents import PIECE_BYTES, Piece
from jaxtrain.data.encoding.formats import BOM, DAMAGE, detect, open_content, read_at
from jaxtrain.data.encoding.held_out import draw
from jaxtrain.data.encoding.table_readers import parquet_units
from jaxtrain.data.encoding.work_units import Unit, damage


def plan_units(files, val_fraction: float, text_field: str, piece_bytes: int = PIECE_BYTES):
    """(units, skipped): the input in the order of the output, and files that are no text."""
    skipped, entries = Counter(), []
    for path, name in tqdm(files, desc="read text", unit="file", delay=1):
        size = 0
        try:
            size = path.stat().st_size
            entry = _entry(str(path), name, size, detect(path, text_field), text_field)
        except DAMAGE as error:
            entry = Unit("problem", size, problem=damage(str(path), error))
        if isinstance(entry, str):
            skipped[entry] += 1
        else:
            entries += entry if isinstance(entry, list) else [entry]
    texts = [entry for entry in entries if isinstance(entry, Piece) and entry.kind == "text"]
    held = {
        id(text): parts for text, parts in zip(texts, _hold_out(texts, val_fraction), strict=True)
    }
    units = []
    for entry in entries:
        parts = held.get(id(entry), [entry])
        if isinstance(entry, Unit):
            units.append(entry)
        elif entry.compression:
            size = os.stat(entry.path).st_size
            units.append(_stream(entry, size, tuple(parts)))
        else:
            units += [cut for part in parts for cut in _cut(part, piece_bytes)]
    return _fill_units(units, piece_bytes), skipped


def _entry(path, name, size, form, text_field):
    """A Piece, a Unit, Units, or the reason why the file is no text."""
    if form.skip:
        return form.skip
    piece = Piece(path, name, 0, size, form.kind, form.compression)
    if form.kind == "text":
        return _judge_text(piece)
    if form.kind == "jsonl" and not form.compression:
        return piece
    if form.kind == "parquet":
        return parquet_units(path, name, size, text_field)
    return _stream(piece, size)


def _stream(piece, size, pieces=()) -> Unit:
    return Unit(piece.kind, size, pieces, piece.path, piece.name, piece.compression)


def _fill_units(entries, piece_bytes) -> list[Unit]:
    """Joins small pieces into units of about piece_bytes."""
    groups, room = [], 0
    for entry in entries:
        if isinstance(entry, Unit):
            groups.append(entry)
            room = 0
            continue
        size = entry.stop - entry.start
        if room < size:
            groups.append([])
            room = piece_bytes
        groups[-1].append(entry)
        room -= size
    size_of = lambda pieces: sum(piece.stop - piece.start for piece in pieces)
    return [g if isinstance(g, Unit) else Unit("pieces", size_of(g), tuple(g)) for g in groups]


def _judge_text(piece: Piece):
    """The piece of the whole text behind its BOM, or why it is none; no part could be judged."""
    head, decoder, size = b"", codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open_content(piece.path, piece.compression) as (stream, _):
            while chunk := stream.read1(PIECE_BYTES):
                size += len(chunk)
                head = (head + chunk[: len(BOM)])[: len(BOM)]
                if b"\0" in chunk:
                    return "holding NUL bytes"
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not UTF-8"
    except DAMAGE as error:
        problem = damage(piece.path, error, size, "text", piece.compression)
        return Unit("problem", piece.stop, problem=problem)
    start = len(BOM) if head == BOM else 0
    return "empty" if start == size else replace(piece, start=start, stop=size)


def _hold_out(texts, fraction) -> list[list[Piece]]:
    """Each text in its parts, of which each is in one split."""
    target = fraction * sum(piece.stop for piece in texts)
    held, taken = set(), 0
    for piece in sorted(texts, key=lambda piece: draw(piece.name)):
        if taken + piece.stop <= target:
            held.add(piece.name)
            taken += piece.stop
    parts = {p.name: [replace(p, split="val") if p.name in held else p] for p in texts}
    if target and taken < target / 2:
        largest = max((p for p in texts if p.name not in held), key=lambda p: p.stop)
        cut = _cut_place(largest, max(1, round(target - taken)))
        if largest.start < cut < largest.stop:
            last = replace(largest, start=cut, split="val")
            parts[largest.name] = [replace(largest, stop=cut), last]
        elif not held and len(texts) > 1:  # texts of a character
            smallest = min(texts, key=lambda p: draw(p.name))
            parts[smallest.name] = [replace(smallest, split="val")]
    return [parts[piece.name] for piece in texts]


def _cut_place(piece, wanted) -> int:
    """Where the last `wanted` bytes of a text begin, or near there."""
    position = max(piece.start, piece.stop - wanted)
    window = read_at(piece.path, piece.compression, position, WINDOW_BYTES)
    cut = position + cut_in_window(window)
    if cut < piece.stop and piece.stop - cut >= wanted / 2:
        return cut
    start = max(piece.start, piece.stop - max(WINDOW_BYTES, 2 * wanted))
    tail = read_at(piece.path, piece.compression, start, piece.stop - start)
    return start + cut_near_end(tail, wanted)


def _cut(piece: Piece, piece_bytes) -> list[Piece]:
    out, start = [], piece.start
    if piece.stop - start <= piece_bytes:
        return [piece]
    with open(piece.path, "rb") as file:
        while piece.stop - start > piece_bytes:
            cut = _boundary(file, piece.kind, start + piece_bytes)
            if not start < cut < piece.stop:
                break
            out.append(replace(piece, start=start, stop=cut, first=piece.first and not out))
            start = cut
    return [*out, replace(piece, start=start, first=piece.first and not out)]


def _boundary(file, kind, position) -> int:
    """Where a file may be cut at or after `position`: after a line, or inside a text."""
    file.seek(position)
    if kind == "text":
        return position + cut_in_window(file.read(WINDOW_BYTES))
    while (line := file.readline(PIECE_BYTES)) and not line.endswith(b"\n"):
        pass  # a line may be longer than the memory
    return file.tell()

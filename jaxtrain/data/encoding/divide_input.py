"""Divides the input files into units, with the validation text separated from the training text."""

import codecs
import os
from collections import Counter
from dataclasses import replace
from typing import BinaryIO

from tqdm import tqdm

from jaxtrain.data.encoding.cut_points import cut_text
from jaxtrain.data.encoding.formats import (
    BOM,
    DAMAGE,
    Format,
    detect,
    open_content,
    printable_path,
)
from jaxtrain.data.encoding.held_out import hold_out_texts
from jaxtrain.data.encoding.input_files import InputFiles
from jaxtrain.data.encoding.table_readers import parquet_units
from jaxtrain.data.encoding.work_units import PIECE_BYTES, Piece, Unit, damage_problem
from jaxtrain.data.tokenizer import Tokenizer


def divide_input(
    files: InputFiles,
    val_fraction: float,
    text_field: str,
    tokenizer: Tokenizer,
    piece_bytes: int = PIECE_BYTES,
) -> tuple[list[Unit], Counter]:
    """Returns the units in the order of the output, and how many files have no text, by reason."""
    skipped, parts = Counter(), []
    for path, name in tqdm(files, desc="read text", unit="file", delay=1):
        size = 0
        try:
            size = path.stat().st_size
            file_format = detect(str(path), text_field)
            part = _inspect(str(path), name, size, file_format, text_field)
        except DAMAGE as error:
            part = Unit("problem", size, problem=damage_problem(str(path), error))
        if isinstance(part, str):
            skipped[part] += 1
        else:
            parts += part if isinstance(part, list) else [part]
    texts = [part for part in parts if isinstance(part, Piece) and part.kind == "text"]
    pieces_of = dict(zip(map(id, texts), hold_out_texts(texts, val_fraction), strict=True))
    divided = []
    for part in parts:
        pieces = pieces_of.get(id(part), [part])
        if isinstance(part, Unit):
            divided.append(part)
        elif part.compression:
            divided.append(_file_unit(part, os.stat(part.path).st_size, tuple(pieces)))
        else:
            divided += [cut for piece in pieces for cut in _cut(piece, piece_bytes, tokenizer)]
    return _join_pieces(divided, piece_bytes), skipped


def _inspect(
    path: str, name: str, size: int, file_format: Format, text_field: str
) -> Piece | Unit | list[Unit] | str:
    """Returns the parts of a file, or the reason why it has no text."""
    if file_format.skip:
        return file_format.skip
    piece = Piece(path, name, 0, size, file_format.kind, file_format.compression)
    if file_format.kind == "text":
        return _inspect_text(piece)
    if file_format.kind == "jsonl" and not file_format.compression:
        return piece
    if file_format.kind == "parquet":
        return parquet_units(path, name, size, text_field)
    return _file_unit(piece, size)


def _file_unit(piece: Piece, size: int, pieces: tuple[Piece, ...] = ()) -> Unit:
    return Unit(piece.kind, size, pieces, piece.path, piece.name, piece.compression)


def _join_pieces(parts: list[Piece | Unit], piece_bytes: int) -> list[Unit]:
    """Joins consecutive small pieces into units of about piece_bytes."""
    units, joined, room = [], [], 0

    def end_unit() -> None:
        if joined:
            size = sum(piece.stop - piece.start for piece in joined)
            units.append(Unit("pieces", size, tuple(joined)))
            joined.clear()

    for part in parts:
        if isinstance(part, Unit):
            end_unit()
            units.append(part)
            continue
        size = part.stop - part.start
        if not joined or room < size:
            end_unit()
            room = piece_bytes
        joined.append(part)
        room -= size
    end_unit()
    return units


def _inspect_text(piece: Piece) -> Piece | Unit | str:
    """Returns a text as one piece without its byte order mark, or why the file is not a text.

    Reads the whole file, because a NUL byte or invalid UTF-8 may be anywhere in it.
    """
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
        problem = damage_problem(piece.path, error, size, "text", piece.compression)
        return Unit("problem", piece.stop, problem=problem)
    start = len(BOM) if head == BOM else 0
    return "empty" if start == size else replace(piece, start=start, stop=size)


def _cut(piece: Piece, piece_bytes: int, tokenizer: Tokenizer) -> list[Piece]:
    """Cuts a text or JSON lines into pieces of about piece_bytes."""
    if piece.stop - piece.start <= piece_bytes:
        return [piece]
    with open(piece.path, "rb") as file:
        if piece.kind == "text":

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            where = printable_path(piece.path)
            return [
                replace(piece, **part._asdict(), first=piece.first and part.start == piece.start)
                for part in cut_text(read, piece.start, piece.stop, piece_bytes, tokenizer, where)
            ]
        cuts = [piece.start]
        while piece.stop - cuts[-1] > piece_bytes:
            cut = _find_line_end(file, cuts[-1] + piece_bytes)
            if cut >= piece.stop:
                break
            cuts.append(cut)
    ends = [*cuts[1:], piece.stop]
    return [replace(piece, start=a, stop=b) for a, b in zip(cuts, ends, strict=True)]


def _find_line_end(file: BinaryIO, position: int) -> int:
    """Returns the end of the line that contains the byte at `position`."""
    file.seek(position)
    # Read in parts, because a line may be larger than memory.
    while (line := file.readline(PIECE_BYTES)) and not line.endswith(b"\n"):
        pass
    return file.tell()

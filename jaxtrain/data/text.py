"""Documents out of text: which files, which are held out, and in what pieces they are encoded.

A file is a document; in a .jsonl file each line is one. Pieces of about 1 MB go to the encoding
processes, so memory stays bounded and the result does not depend on who encodes which piece.
"""

import codecs
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxtrain.data.coverage import LOST, check_covers

PIECE_BYTES = 1 << 20
NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Piece:
    """Bytes start:stop of a file, encoded by one process."""

    path: str
    name: str  # path below the source, the same on every machine
    start: int
    stop: int
    lines: bool = False  # JSON, one document a line
    split: str = "train"  # where a text goes; lines are drawn one by one
    first: bool = True  # a document starts here


@dataclass
class Encoded:
    """What one process made of its pieces."""

    tokens: dict[str, np.ndarray]  # split -> the documents' tokens, end to end
    sizes: dict[str, list[tuple[int, int]]]  # split -> (tokens, text bytes) of each document
    skipped: Counter


def list_files(source: str, exclude: str | Path) -> list[tuple[Path, str]]:
    """Sorted (path, name) of a text file, of a folder's files, or of Python's own source ("").

    Hidden files are left out, and so is the folder `exclude`, where the tokens are written.

    Raises:
        ValueError: there is no file.
    """
    stdlib = not source
    root = Path(sysconfig.get_path("stdlib") if stdlib else source).expanduser()
    if root.is_file():
        return [(root, root.name)]
    exclude, found = Path(exclude).resolve(), []
    for folder, folders, names in os.walk(root):
        hidden = NOT_SOURCE if stdlib else set()
        folders[:] = [
            name
            for name in folders
            if name[0] != "." and name not in hidden and Path(folder, name).resolve() != exclude
        ]
        for path in (Path(folder, name) for name in names if name[0] != "."):
            generated = path.name.startswith("_sysconfigdata")  # one machine's build flags
            if path.is_file() and (not stdlib or path.suffix == ".py" and not generated):
                found.append((path, path.relative_to(root).as_posix()))
    if not found:
        raise ValueError(
            f"data.text must be a text file, or a folder that holds some; got {source!r}, looked "
            f"in {root}. Set --config.data.text."
        )
    return sorted(found, key=lambda pair: pair[1])


def source_key(files, *options) -> str:
    """32 hex digits that change when a file's name, size or time does, or an option."""
    digest = hashlib.sha256(json.dumps(options).encode())
    for path, name in files:
        stat = path.stat()
        digest.update(f"\n{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def plan_pieces(files, val_fraction: float, piece_bytes: int = PIECE_BYTES):
    """(tasks, skipped): lists of pieces of about `piece_bytes`, in the order of the output.

    Held out are whole files, drawn by name up to val_fraction of the bytes; where no set of whole
    files comes near that, the last part of the largest. Lines of .jsonl are drawn one by one.
    """
    skipped, whole = Counter(), []
    for path, name in tqdm(files, desc="read text", unit="file", delay=1):
        size, lines = path.stat().st_size, path.suffix == ".jsonl"
        reason = "" if lines else _unreadable(path)
        if reason or not size:
            skipped[reason or "empty"] += 1
        else:
            whole.append(Piece(str(path), name, 0, size, lines))
    pieces = []
    for piece in _hold_out(whole, val_fraction):
        pieces += _cut(piece, piece_bytes)
    tasks, room = [], 0
    for piece in pieces:
        if room < piece.stop - piece.start:
            tasks.append([])
            room = piece_bytes
        tasks[-1].append(piece)
        room -= piece.stop - piece.start
    return tasks, skipped


def encode_pieces(pieces, tokenizer, text_field: str, val_fraction: float) -> Encoded:
    """Tokens of each document, with eot before its first.

    Raises:
        ValueError: a line is not a JSON object with a string under `text_field`, or a document's
            tokens do not stand for it.
    """
    tokens, sizes, skipped = {"train": [], "val": []}, {"train": [], "val": []}, Counter()
    dtype = token_dtype(tokenizer.vocab_size)
    for piece in pieces:
        for split, content in _documents(piece, text_field, val_fraction):
            reason = _reject(content)
            if reason:
                skipped[reason] += 1
                continue
            text = content.decode()
            ids = tokenizer.encode(text).astype(dtype)
            lost = check_covers(tokenizer, text, ids, f"{piece.path}, from byte {piece.start}")
            skipped.update({LOST: lost} if lost else {})
            eot = np.full(int(piece.first or piece.lines), tokenizer.eot, dtype)
            tokens[split] += [eot, ids]
            sizes[split].append((eot.size + ids.size, len(content)))
    empty = [np.empty(0, dtype)]
    joined = {split: np.concatenate(empty + arrays) for split, arrays in tokens.items()}
    return Encoded(joined, sizes, skipped)


def token_dtype(vocab_size: int) -> str:
    """The shard dtype that holds every id below vocab_size."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _reject(content: bytes) -> str:
    if not content:
        return "empty"
    if b"\0" in content:
        return "holding NUL bytes"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def _unreadable(path) -> str:
    """Why a file is no text, or ""; its pieces could not be judged one by one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while chunk := file.read(PIECE_BYTES):
                if b"\0" in chunk:
                    return "holding NUL bytes"
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "not UTF-8"
    return ""


def _draw(name: str) -> float:
    """A number in [0, 1) that belongs to the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _hold_out(pieces, fraction) -> list[Piece]:
    texts = sorted((p for p in pieces if not p.lines), key=lambda p: _draw(p.name))
    target = fraction * sum(p.stop for p in texts)
    held, taken = set(), 0
    for piece in texts:
        if taken + piece.stop <= target:
            held.add(piece.path)
            taken += piece.stop
    pieces = [replace(p, split="val") if p.path in held else p for p in pieces]
    if not target or taken >= target / 2:
        return pieces
    largest = max((p for p in pieces if p.path not in held and not p.lines), key=lambda p: p.stop)
    cut = _boundary(largest, largest.stop - round(target - taken))
    out = []
    for piece in pieces:
        if piece is not largest or not 0 < cut < piece.stop:
            out.append(piece)
        else:
            out += [replace(piece, stop=cut), replace(piece, start=cut, split="val")]
    return out


def _cut(piece: Piece, piece_bytes) -> list[Piece]:
    out, start = [], piece.start
    while piece.stop - start > piece_bytes:
        cut = _boundary(piece, start + piece_bytes)
        if not start < cut < piece.stop:
            break
        out.append(replace(piece, start=start, stop=cut, first=piece.first and not out))
        start = cut
    return [*out, replace(piece, start=start, first=piece.first and not out)]


def _boundary(piece: Piece, position: int) -> int:
    """Where a file may be cut at or after `position`.

    Lines: after a newline. Texts: between a printable character and a newline, where no token of
    GPT-2's pattern reaches across; if there is none near, between two characters.
    """
    with open(piece.path, "rb") as file:
        file.seek(position)
        if piece.lines:
            return position + len(file.readline())
        window = file.read(1 << 16)
    if match := re.search(rb"[!-~]\n", window):
        return position + match.start() + 1
    continuations = 0
    while continuations < len(window) and window[continuations] & 0xC0 == 0x80:
        continuations += 1
    return position + continuations


def _documents(piece: Piece, text_field, val_fraction):
    """(split, bytes) of each document in the piece, or of the piece of one."""
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        content = file.read(piece.stop - piece.start)
    if not piece.lines:
        yield piece.split, content
        return
    at = piece.start
    for line in content.split(b"\n"):
        if line.strip():
            split = "val" if _draw(f"{piece.name}:{at}") < val_fraction else "train"
            yield split, _field(piece.path, at, line, text_field)
        at += len(line) + 1


def _field(path, at, line, text_field) -> bytes:
    where = f"{path}, line at byte {at}: expected a JSON object with a string {text_field!r}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}; found no JSON: {error}.") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where}; found {keys}. Set --text_field.")
    return text.encode(errors="surrogatepass")  # a lone surrogate is then skipped as not UTF-8

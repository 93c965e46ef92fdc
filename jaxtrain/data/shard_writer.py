"""Writes token shards in llm.c's format."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtrain.data.shards import HEADER_BYTES, LLMC_FORMS
from jaxtrain.file_errors import add_path_to_errors


class ShardWriter:
    """Writes the tokens of a split into numbered shards of `shard_tokens` tokens each.

    Attributes:
        entries: for each shard its file, split, tokens and text_bytes; a complete one also has its
            fingerprint.
    """

    def __init__(self, folder: Path, stem: str, split: str, dtype: str, shard_tokens: int):
        self._folder, self._stem, self._split = folder, stem, split
        self._dtype, self._shard_tokens = np.dtype(dtype), shard_tokens
        self._file = None
        self._digest = hashlib.sha256()  # of the tokens in the open file
        self.entries: list[dict] = []

    def append(self, tokens: np.ndarray, sizes: Sequence[tuple[int, int]]) -> None:
        """Appends documents.

        If a shard ends inside a document, the document's text bytes are divided in proportion to
        its tokens.

        Args:
            tokens: the documents' tokens, end to end.
            sizes: (tokens, text bytes) of each document.
        """
        token_ends = np.cumsum([n for n, _ in sizes])
        text_ends = np.cumsum([n for _, n in sizes])
        start = text_start = 0
        while start < len(tokens):
            file, entry = self._open()
            stop = min(len(tokens), start + self._shard_tokens - entry["tokens"])
            text_stop = round(np.interp(stop, [0, *token_ends], [0, *text_ends]))
            chunk = np.ascontiguousarray(tokens[start:stop], self._dtype)
            with add_path_to_errors(file.name, file):
                file.write(chunk.data)
            self._digest.update(chunk.data)
            entry["tokens"] += stop - start
            entry["text_bytes"] += text_stop - text_start
            start, text_start = stop, text_stop
            if entry["tokens"] == self._shard_tokens:
                self.close()

    def _open(self):
        """Returns the file of the unfinished shard and its entry; starts one if there is none."""
        if self._file is None:
            name = f"{self._stem}_{self._split}_{len(self.entries):06d}.bin"
            self.entries.append({"file": name, "split": self._split, "tokens": 0, "text_bytes": 0})
            self._file = open(self._folder / name, "wb")
            self._file.write(bytes(HEADER_BYTES))  # filled in by close(), which knows the count
            self._digest = hashlib.sha256()
        return self._file, self.entries[-1]

    def close(self) -> None:
        """Writes the header of the unfinished shard and returns once the shard is on disk."""
        if self._file is None:
            return
        entry, header = self.entries[-1], np.zeros(HEADER_BYTES // 4, "<i4")
        forms = {np.dtype(form): (magic, version) for magic, (version, form) in LLMC_FORMS.items()}
        header[:3] = *forms[self._dtype], entry["tokens"]
        with add_path_to_errors(self._file.name, self._file):
            self._file.seek(0)
            self._file.write(header.data)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        entry["fingerprint"] = self._digest.hexdigest()[:32]

    def flush(self) -> None:
        """Returns once all appended tokens are on disk, so that `entries` describe the files."""
        if self._file is not None:
            with add_path_to_errors(self._file.name, self._file):
                self._file.flush()
                os.fsync(self._file.fileno())

    def restore(self, entries: list[dict]) -> None:
        """Continues after the tokens that `entries` of an earlier writer describe.

        Raises:
            OSError, ValueError: a shard is missing, or shorter than described.
        """
        self.entries = [dict(entry) for entry in entries]
        if not entries or "fingerprint" in entries[-1]:
            return
        entry = self.entries[-1]
        file = self._file = open(self._folder / entry["file"], "r+b")
        self._digest = hashlib.sha256()
        file.seek(HEADER_BYTES)
        left = entry["tokens"] * self._dtype.itemsize
        while left:
            chunk = file.read(min(left, 1 << 24))
            if not chunk:
                raise ValueError(f"{entry['file']} is shorter than its {entry['tokens']} tokens")
            self._digest.update(chunk)
            left -= len(chunk)
        file.truncate()  # drops what was written after the entries were stored
        file.seek(0, os.SEEK_END)

    def abandon(self) -> None:
        """Closes the unfinished shard as it is, without a header."""
        if self._file is not None:
            self._file.close()
            self._file = None

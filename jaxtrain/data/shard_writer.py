"""Writes token shards in llm.c's format."""

import hashlib
import os
from pathlib import Path

import numpy as np

from jaxtrain.data.shards import HEADER_BYTES, LLMC_FORMS
from jaxtrain.file_errors import add_path_to_errors


class ShardWriter:
    """Writes one split's tokens into a row of llm.c shards of `shard_tokens` each."""

    def __init__(self, folder: Path, stem: str, split: str, dtype: str, shard_tokens: int):
        self._folder, self._stem, self._split = folder, stem, split
        self._dtype, self._shard_tokens = np.dtype(dtype), shard_tokens
        self._file = None
        self.entries: list[dict] = []

    def append(self, tokens: np.ndarray, sizes) -> None:
        """Adds documents; `sizes` holds the (tokens, text bytes) of each.

        A document that is cut by a shard's end shares its bytes out by tokens.
        """
        ends = np.cumsum([n for n, _ in sizes])
        text_ends = np.cumsum([n for _, n in sizes])
        done, text_done = 0, 0
        while done < len(tokens):
            entry = self._open()
            stop = min(len(tokens), done + self._shard_tokens - entry["tokens"])
            text = round(np.interp(stop, [0, *ends], [0, *text_ends]))
            chunk = np.ascontiguousarray(tokens[done:stop], self._dtype)
            with add_path_to_errors(self._file.name, self._file):
                self._file.write(chunk)
            self._digest.update(chunk)
            entry["tokens"] += stop - done
            entry["text_bytes"] += text - text_done
            done, text_done = stop, text
            if entry["tokens"] == self._shard_tokens:
                self.close()

    def _open(self) -> dict:
        if self._file is None:
            name = f"{self._stem}_{self._split}_{len(self.entries):06d}.bin"
            self.entries.append({"file": name, "split": self._split, "tokens": 0, "text_bytes": 0})
            self._file = open(self._folder / name, "wb")
            self._file.write(bytes(HEADER_BYTES))
            self._digest = hashlib.sha256()
        return self.entries[-1]

    def close(self) -> None:
        """Completes the shard being written: its header, then the disk."""
        if self._file is None:
            return
        entry, header = self.entries[-1], np.zeros(HEADER_BYTES // 4, "<i4")
        forms = {np.dtype(form): (magic, version) for magic, (version, form) in LLMC_FORMS.items()}
        header[:3] = *forms[self._dtype], entry["tokens"]
        with add_path_to_errors(self._file.name, self._file):
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        entry["fingerprint"] = self._digest.hexdigest()[:32]

    def flush(self) -> None:
        """Returns once all that was appended is on disk; `entries` then describe it."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def restore(self, entries: list[dict]) -> None:
        """Goes on behind what `entries` of an earlier writer describe.

        Raises:
            OSError, ValueError: a shard is missing, or shorter than described.
        """
        self.entries = [dict(entry) for entry in entries]
        if not entries or "fingerprint" in entries[-1]:
            return
        entry = self.entries[-1]
        self._file, self._digest = open(self._folder / entry["file"], "r+b"), hashlib.sha256()
        self._file.seek(HEADER_BYTES)
        left = entry["tokens"] * self._dtype.itemsize
        while left:
            chunk = self._file.read(min(left, 1 << 24))
            if not chunk:
                raise ValueError(f"{entry['file']} is shorter than its {entry['tokens']} tokens")
            self._digest.update(chunk)
            left -= len(chunk)
        self._file.truncate()
        self._file.seek(0, os.SEEK_END)

    def abandon(self) -> None:
        """Closes the file being written, as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

"""Opens a corpus: all token shards of one split, checked in full before the first step.

Training only reads shards. Text is encoded into shards below the run's folder first.
"""

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.encoding.counts import describe_skipped
from jaxtrain.data.encoding.formats import printable_path
from jaxtrain.data.encoding.roundtrip import LOST
from jaxtrain.data.metadata import read_metadata, shard_entries
from jaxtrain.data.shard_checks import check_shards, describe_duplicates
from jaxtrain.data.shard_files import describe_unused, find_shards
from jaxtrain.data.shards import Shard
from jaxtrain.data.text_cache import discard_if_damaged, encode_text
from jaxtrain.data.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Corpus:
    """The checked shards of one split. A file is opened when it is first read."""

    split: str
    shards: tuple[Shard, ...]
    fingerprint: str  # of the tokens in their order, not of paths or file formats
    largest_token: int
    tokenizer_name: str | None  # None: unknown, as the shards were made elsewhere
    eot: int  # the token that separates documents; -1: unknown
    bytes_per_token: float | None  # of the encoded text; None: unknown
    note: str = ""
    shard_fingerprints: tuple[str, ...] = ()
    _open: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    _starts: dict[int, np.ndarray | None] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict:
        # A pickle of a memory map would copy the tokens.
        return self.__dict__ | {"_open": {}, "_starts": {}}

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def windows(self, T: int) -> int:
        """Returns how many windows of T+1 tokens there are: one every T tokens of each shard."""
        return int(self.windows_by_shard(T).sum())

    def windows_by_shard(self, T: int) -> np.ndarray:
        """Returns the number of whole windows in each shard, [shards] int64."""
        return (np.array([shard.tokens for shard in self.shards], np.int64) - 1) // T

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Returns tokens start:stop of a shard in its own dtype, as a view of the mapped file."""
        tokens = self._open.get(shard)
        if tokens is None:
            tokens = self._open[shard] = self.shards[shard].open()
        return tokens[start:stop]

    def indexed_starts(self, shard: int) -> np.ndarray | None:
        """Returns the first token of each document, int64, if the shard's index stores them."""
        if shard not in self._starts:
            self._starts[shard] = self.shards[shard].document_starts()
        return self._starts[shard]

    def starts_between(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Returns which of the tokens start:stop of a shard start a document, int64, ascending.

        They are those that the shard's index names. Without an index they are the eots, or none
        if eot is unknown.
        """
        indexed = self.indexed_starts(shard)
        if indexed is not None:
            first, last = np.searchsorted(indexed, (start, stop))
            return indexed[first:last]
        return start + np.flatnonzero(self.read(shard, start, stop) == self.eot)

    def is_between_documents(self, shard: int, token: int) -> bool:
        """Returns whether one document ends before a token and another one starts there.

        If `token` is the end of the shard, that is decided by the first token of the next shard,
        because a document may go on there.
        """
        if token == self.shards[shard].tokens:
            shard, token = shard + 1, 0
        return shard == len(self.shards) or len(self.starts_between(shard, token, token + 1)) > 0

    def documents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (shard, start, length) of each document, int64 [documents] each.

        A document ends where the next one starts, see starts_between, or at the end of the shard.

        Raises:
            ValueError: eot is needed and unknown, or no shard contains it.
        """
        check_boundaries(self)
        shards, starts, lengths, found_any = [], [], [], False
        for i, shard in enumerate(self.shards):
            step = 1 << 22  # bounds the memory of the comparison with eot
            found = [
                self.starts_between(i, start, min(start + step, shard.tokens))
                for start in range(0, shard.tokens, step)
            ]
            found_any |= any(map(len, found))
            starts.append(np.union1d(np.concatenate(found), [0]).astype(np.int64))
            shards.append(np.full(len(starts[-1]), i))
            lengths.append(np.diff(starts[-1], append=shard.tokens))
        if not found_any:
            raise ValueError(
                f"data.eot must be the token that separates documents; got data.eot={self.eot}, "
                f"which no shard contains, from {self.shards[0].path} on. Set --data.eot."
            )
        return np.concatenate(shards), np.concatenate(starts), np.concatenate(lengths)

    def boundaries_fingerprint(self) -> str | None:
        """Returns a hash of the document boundaries of all indices, or None if no shard has one.

        The fingerprint of the tokens does not cover these boundaries.
        """
        indexed = [(i, self.indexed_starts(i)) for i in range(len(self.shards))]
        digest = hashlib.sha256()
        for i, starts in indexed:
            if starts is not None:
                digest.update(f"{i} {len(starts)}\n".encode() + starts.astype("<i8").tobytes())
        return digest.hexdigest()[:32] if any(s is not None for _, s in indexed) else None

    def token_bytes(self) -> np.ndarray | None:
        """Returns the bytes of text that each token stands for, [vocabulary] int32.

        Special tokens stand for 0 bytes. Returns None if the shards' tokenizer is unknown.
        """
        if self.bytes_per_token is None or self.tokenizer_name is None:
            return None
        return build_tokenizer(self.tokenizer_name).token_bytes

    def describe(self) -> str:
        """Returns one line about the corpus for the start of a run."""
        formats = sorted({f"{s.format} {np.dtype(s.dtype).name}" for s in self.shards})
        text = "" if self.bytes_per_token is None else f", {self.bytes_per_token:.3f} bytes/token"
        note = f", {self.note}" if self.note else ""
        return (
            f"{self.split}: {self.tokens:,} tokens in {len(self.shards)} shard(s) of "
            f"{' and '.join(formats)}, tokenizer {self.tokenizer_name or 'unknown'}{text}, "
            f"fingerprint {self.fingerprint[:12]}{note}"
        )


def check_boundaries(corpus: Corpus) -> None:
    """Raises ValueError if it is unknown where documents start."""
    if corpus.eot >= 0:
        return
    without = [s for i, s in enumerate(corpus.shards) if corpus.indexed_starts(i) is None]
    if not without:
        return
    hint = "GPT-2's is 50256"
    if corpus.tokenizer_name:
        known = build_tokenizer(corpus.tokenizer_name).eot
        hint = f"that of data.tokenizer={corpus.tokenizer_name} would be {known}"
    is_indexed = without[0].format == "megatron"
    missing = "all documents in its .idx" if is_indexed else "its end-of-text token"
    raise ValueError(
        "data.eot must be the token that separates documents, for data.pack and "
        f"data.document_mask; got data.eot=-1, and {printable_path(without[0].path)} does not name "
        f"{missing}. Set --data.eot ({hint})."
    )


def note_shared_shards(train: Corpus, held_out: Corpus) -> Corpus:
    """Returns `train`, with a warning in its note if a held-out shard repeats one of its shards."""
    paths = dict(zip(train.shard_fingerprints, train.shards, strict=True))
    shared = [
        f"{printable_path(shard.path)} those of {printable_path(paths[fingerprint].path)}"
        for shard, fingerprint in zip(held_out.shards, held_out.shard_fingerprints, strict=True)
        if fingerprint in paths
    ]
    if not shared:
        return train
    warning = f"warning: held-out shards repeat tokens of training: {'; '.join(shared[:4])}"
    return replace(train, note=f"{train.note}, {warning}" if train.note else warning)


class _SplitFiles(NamedTuple):
    """The shard files of a split before they are checked."""

    paths: list[Path]
    metadata_of: dict[Path, dict]  # folder -> its meta.json
    notes: list[str]


def open_corpus(cfg: DataConfig, split: str, vocab_size: int, workdir: str | Path) -> Corpus:
    """Returns the corpus of split "train" or "val" with every shard checked.

    With data.text the text is encoded below `workdir` first, unless an earlier start did that.

    Raises:
        ValueError: shards are missing, differ from what they declare, or contain a token outside
            the vocabulary. One message lists each of them as file, expected, found.
    """
    if cfg.mixture:
        raise ValueError(
            f"data.mixture must be empty for this command; got {cfg.mixture!r}. Set --data.shards."
        )
    files = _find_files(cfg, split, vocab_size, Path(workdir))
    entries = shard_entries(files.metadata_of)
    try:
        shards, checksums = check_shards(files.paths, entries, cfg.shard_format, vocab_size)
    except ValueError as error:
        if cfg.shards:  # the user's own files are never replaced
            raise
        [folder] = files.metadata_of
        check = lambda: check_shards(files.paths, entries, cfg.shard_format, vocab_size)
        if not discard_if_damaged(folder, check):
            raise
        logging.warning("%s\nThe text is encoded again.", error)
        files = _find_files(cfg, split, vocab_size, Path(workdir))
        entries = shard_entries(files.metadata_of)
        shards, checksums = check_shards(files.paths, entries, cfg.shard_format, vocab_size)
    digest = hashlib.sha256()
    for shard, checksum in zip(shards, checksums, strict=True):
        digest.update(f"{shard.tokens} {checksum.fingerprint}\n".encode())
    largest_token = max(checksum.largest for checksum in checksums)

    # meta.json is used only if it describes all shards and one tokenizer made them.
    described = [path for path in files.paths if path in entries]
    folders = [files.metadata_of[path.parent] for path in described]
    made_with = {(metadata["tokenizer"], metadata["eot"]) for metadata in folders}
    if len(described) == len(files.paths) and len(made_with) == 1:
        [(tokenizer_name, eot)] = made_with
        text_bytes = sum(entries[path]["text_bytes"] for path in described)
        bytes_per_token = text_bytes / sum(shard.tokens for shard in shards)
    else:
        # Which of the tokens separates documents is not guessed.
        tokenizer_name, eot, bytes_per_token = _configured_tokenizer(cfg, largest_token), -1, None
    return Corpus(
        split=split,
        shards=tuple(shards),
        fingerprint=digest.hexdigest()[:32],
        largest_token=largest_token,
        tokenizer_name=tokenizer_name,
        eot=cfg.eot if cfg.eot >= 0 else eot,
        bytes_per_token=bytes_per_token,
        note=", ".join(
            [
                *files.notes,
                *_text_losses(files.metadata_of),
                *describe_duplicates(shards, checksums),
            ]
        ),
        shard_fingerprints=tuple(checksum.fingerprint for checksum in checksums),
    )


def _find_files(cfg: DataConfig, split: str, vocab_size: int, workdir: Path) -> _SplitFiles:
    if not cfg.shards:
        folder, metadata = encode_text(cfg, vocab_size, workdir)
        paths = [folder / e["file"] for e in metadata["shards"] if e["split"] == split]
        if not paths:
            raise ValueError(
                f"data.text must contain a document for {split}; got none with "
                f"data.val_fraction={cfg.val_fraction}. Set --data.val_fraction=0.05."
            )
        return _SplitFiles(paths, {folder: metadata}, [describe_skipped(metadata["skipped"])])
    paths = find_shards(cfg.shards, split)
    metadata_of = {}
    for folder in {path.parent for path in paths}:
        if metadata := read_metadata(folder):
            metadata_of[folder] = metadata
    if os.path.isdir(Path(cfg.shards).expanduser()):
        # A listed shard that is gone is added, so that it is reported.
        listed = {
            path for path, entry in shard_entries(metadata_of).items() if entry["split"] == split
        }
        paths = sorted({*paths, *listed})
    return _SplitFiles(paths, metadata_of, describe_unused(cfg.shards) if split == "train" else [])


def _text_losses(metadata_of: dict[Path, dict]) -> list[str]:
    """Returns notes on how the tokens of encoded shards differ from their text."""
    notes = []
    for name in sorted({metadata["tokenizer"] for metadata in metadata_of.values()}):
        notes += [f"{Path(name).name}: {note}" for note in build_tokenizer(name).notes]
    for metadata in metadata_of.values():
        lost = metadata["skipped"].get(LOST)
        if lost:
            text_bytes = sum(entry["text_bytes"] for entry in metadata["shards"])
            notes.append(f"{lost / text_bytes:.2%} of the text is unknown to the tokenizer")
    return notes


def _configured_tokenizer(cfg: DataConfig, largest_token: int) -> str | None:
    """Returns data.tokenizer if its vocabulary contains all tokens of the shards, else None."""
    fits = largest_token < build_tokenizer(cfg.tokenizer).vocab_size
    return cfg.tokenizer if fits else None

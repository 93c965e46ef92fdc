"""A corpus: the token shards of one split, checked in full before the first step.

Text is encoded once, into shards below the run's folder; what trains is always shards.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from absl import logging

from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.encoding.counts import describe_skipped
from jaxtrain.data.encoding.roundtrip import LOST
from jaxtrain.data.shard_checksums import scan_shards
from jaxtrain.data.shards import Shard, find_shards, left_out, probe
from jaxtrain.data.text_cache import encode_text, prepare_again, read_meta
from jaxtrain.data.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Checked shards of one split. Files are opened when read, and dropped when pickled."""

    split: str
    shards: tuple[Shard, ...]
    fingerprint: str  # of the tokens and their order; not of paths or file formats
    largest: int  # token
    tokenizer_name: str | None  # None: unknown, shards of others
    eot: int  # -1: unknown
    bytes_per_token: float | None  # of text; None: unknown
    note: str = ""
    _open: dict = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def windows(self, T: int) -> int:
        """Windows of T+1 tokens that start every T tokens; none crosses a shard."""
        return int(self.windows_by_shard(T).sum())

    def windows_by_shard(self, T: int) -> np.ndarray:
        """[shards] int64"""
        return (np.array([shard.tokens for shard in self.shards], np.int64) - 1) // T

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens start:stop of a shard, in its own dtype, not copied."""
        tokens = self._open.get(shard)
        if tokens is None:
            tokens = self._open[shard] = self.shards[shard].open()
        return tokens[start:stop]

    def documents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, start, length), [N] int64 each: from an eot to before the next one.

        Raises:
            ValueError: eot is unknown, or stands nowhere.
        """
        check_eot(self)
        parts, starts_found = [], 0
        for i, shard in enumerate(self.shards):
            step = 1 << 22  # bounds the memory of the comparison
            found = [
                start + np.flatnonzero(self.read(i, start, start + step) == self.eot)
                for start in range(0, shard.tokens, step)
            ]
            starts_found += sum(map(len, found))
            starts = np.union1d(np.concatenate(found), [0]).astype(np.int64)
            parts.append((np.full(len(starts), i), starts, np.diff(starts, append=shard.tokens)))
        if not starts_found:
            raise ValueError(
                f"data.eot must be the token that starts documents; got data.eot={self.eot}, "
                f"which stands nowhere in {self.shards[0].path}. Set --data.eot."
            )
        return tuple(np.concatenate(x) for x in zip(*parts, strict=True))

    def token_bytes(self) -> np.ndarray | None:
        """Returns the bytes of text that each token stands for, [vocabulary] int32.

        Special tokens stand for none. None where it is unknown what made the shards.
        """
        if self.bytes_per_token is None:
            return None
        return build_tokenizer(self.tokenizer_name).token_bytes

    def describe(self) -> str:
        """One line for the start of a run."""
        formats = sorted({f"{s.format} {np.dtype(s.dtype).name}" for s in self.shards})
        text = "" if self.bytes_per_token is None else f", {self.bytes_per_token:.3f} bytes/token"
        return (
            f"{self.split}: {self.tokens:,} tokens in {len(self.shards)} shard(s) of "
            f"{' and '.join(formats)}, tokenizer {self.tokenizer_name or 'unknown'}{text}, "
            f"fingerprint {self.fingerprint[:12]}{self.note and ', ' + self.note}"
        )


def check_eot(corpus: Corpus) -> None:
    """Raises ValueError unless the token that starts documents is known."""
    if corpus.eot < 0:
        raise ValueError(
            "data.eot must be known for data.pack and data.document_mask; got data.eot=-1 and "
            "shards whose tokenizer is unknown. Set --data.eot (GPT-2's is 50256)."
        )


def open_corpus(cfg: DataConfig, split: str, vocab_size: int, workdir: str | Path) -> Corpus:
    """The corpus of split "train" or "val", encoded first if it is text; every shard is checked.

    Raises:
        ValueError: shards are missing, or are not what they declare, or hold a token outside
            the vocabulary; one message lists all of them as file, expected, found.
    """
    where = cfg, split, vocab_size, Path(workdir)
    paths, metas, note = _locate(*where)
    try:
        shards, scans = _check_shards(paths, cfg, vocab_size, metas)
    except ValueError as error:
        if cfg.shards or not prepare_again(
            *metas, lambda: _check_shards(paths, cfg, vocab_size, metas)
        ):
            raise
        logging.warning("%s\nThe text is encoded again.", error)
        paths, metas, note = _locate(*where)
        shards, scans = _check_shards(paths, cfg, vocab_size, metas)
    entries = _entries(metas)
    digest = hashlib.sha256()
    for shard, scan in zip(shards, scans, strict=True):
        digest.update(f"{shard.tokens} {scan.fingerprint}\n".encode())
    text_bytes = [entries[path]["text_bytes"] for path in paths if path in entries]
    tokens = sum(shard.tokens for shard in shards)
    largest = max(scan.largest for scan in scans)
    makers = {(metas[p.parent]["tokenizer"], metas[p.parent]["eot"]) for p in paths if p in entries}
    known = len(text_bytes) == len(paths) and len(makers) == 1
    name, eot = _tokenizer_of(cfg, makers if known else (), largest)
    notes = [note, *_losses(metas)] if note else _losses(metas)
    return Corpus(
        split=split,
        shards=tuple(shards),
        fingerprint=digest.hexdigest()[:32],
        largest=largest,
        tokenizer_name=name,
        eot=eot,
        bytes_per_token=sum(text_bytes) / tokens if known else None,
        note=", ".join(notes),
    )


def _locate(cfg, split, vocab_size, workdir):
    """(paths, {folder: its meta.json}, note) of the split's shards."""
    if not cfg.shards:
        folder, meta = encode_text(cfg, vocab_size, workdir)
        paths = [folder / e["file"] for e in meta["shards"] if e["split"] == split]
        if not paths:
            raise ValueError(
                f"data.text must hold a document for {split}; got none with "
                f"data.val_fraction={cfg.val_fraction}. Set --data.val_fraction=0.05."
            )
        return paths, {folder: meta}, describe_skipped(meta["skipped"])
    paths = find_shards(cfg.shards, split)
    metas = {folder: read_meta(folder) for folder in {path.parent for path in paths}}
    metas = {folder: meta for folder, meta in metas.items() if meta}
    folder = Path(cfg.shards).expanduser()
    if folder in metas:  # what meta.json lists must be there: _check_shards names what is not
        listed = {folder / e["file"] for e in metas[folder]["shards"] if e["split"] == split}
        paths = sorted({*paths, *listed})
    others = left_out(cfg.shards) if split == "train" else []
    note = f"{len(others)} file(s) left out by name: {', '.join(others[:4])}" if others else ""
    return paths, metas, note


def _losses(metas) -> list[str]:
    """What the tokenizer.json files of encoded shards leave out of the text or change in it."""
    notes = []
    for name in sorted({meta["tokenizer"] for meta in metas.values()}):
        notes += [f"{Path(name).name}: {note}" for note in build_tokenizer(name).notes]
    for meta in metas.values():
        lost = meta["skipped"].get(LOST)
        if lost:
            text_bytes = sum(entry["text_bytes"] for entry in meta["shards"])
            notes.append(f"{lost / text_bytes:.2%} of the text is unknown to the tokenizer")
    return notes


def _entries(metas) -> dict:
    """What each meta.json says of its shards, by path."""
    return {folder / e["file"]: e for folder, meta in metas.items() for e in meta["shards"]}


def _check_shards(paths, cfg, vocab_size, metas):
    """Shards and their scans; every bad one is named in one ValueError."""
    problems, shards, entries = [], [], _entries(metas)
    for path in paths:
        try:
            shards.append(probe(path, cfg.shard_format))
        except ValueError as error:
            problems.append(str(error))
    scans = scan_shards(shards)
    for shard, scan in zip(shards, scans, strict=True):
        entry = entries.get(Path(shard.path), {})
        problem = _judge(shard, scan, vocab_size, entry)
        if problem:
            problems.append(f"{shard.path}: {problem}.")
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(f"{len(problems)} of {len(paths)} shards cannot be used:\n  {listed}")
    return shards, scans


def _judge(shard, scan, vocab_size, entry) -> str:
    if shard.format == "nanogpt" and scan.odd_zero and scan.largest:
        return "expected uint16 tokens; found every second one 0, the look of uint32"
    if scan.smallest < 0:
        return f"expected tokens of at least 0; found {scan.smallest}"
    declared = entry.get("fingerprint", scan.fingerprint)
    if declared != scan.fingerprint:
        return f"expected fingerprint {declared} by meta.json; found {scan.fingerprint}"
    if scan.largest >= vocab_size:
        return f"expected tokens below model.V={vocab_size}; found {scan.largest}. Set --model.V"
    return ""


def _tokenizer_of(cfg, makers, largest) -> tuple[str | None, int]:
    """(name, eot): the makers' by meta.json; else data.tokenizer's if it can have made them."""
    if len(makers) == 1:
        [(name, eot)] = makers
        return name, cfg.eot if cfg.eot >= 0 else eot
    tokenizer = build_tokenizer(cfg.tokenizer)
    if largest >= tokenizer.vocab_size:
        return None, cfg.eot
    return cfg.tokenizer, cfg.eot if cfg.eot >= 0 else tokenizer.eot

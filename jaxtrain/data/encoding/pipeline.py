"""Files to token shards: units are read in order, encoded by several processes, and written.

The result depends neither on the number of processes nor on how the input is cut, and an encoding
that was stopped goes on where its journal ends.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path

from absl import logging
from tqdm import tqdm

from jaxtrain.data.encoding.counts import (
    Flags,
    Rules,
    Totals,
    check_all,
    check_so_far,
    next_forced,
    stored_totals,
    totals_of,
)
from jaxtrain.data.encoding.divide_input import plan_units
from jaxtrain.data.encoding.documents import (
    PIECE_BYTES,
    SPLITS,
    TOO_LONG,
    Forced,
    Options,
    token_dtype,
)
from jaxtrain.data.encoding.input_files import check_unchanged, source_key, stamps
from jaxtrain.data.encoding.journal import Journal
from jaxtrain.data.encoding.readers import read_unit
from jaxtrain.data.encoding.roundtrip import LOST, Refused, check_lost
from jaxtrain.data.encoding.workers import run_tasks
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.data.tokenizer import build_tokenizer, tokenizer_identity
from jaxtrain.files import write_atomic

META_FORMAT = 1
ENCODING = 3  # raised when the same input gives other tokens
SHARD_TOKENS = 100_000_000
JOURNAL_S = 10.0  # between entries of the journal: what a kill can cost


def encoding_key(
    files, tokenizer_name, val_fraction, shard_tokens, text_field, name, on_bad_document="skip"
) -> str:
    """Stands for what an encoding is made of; equal keys make equal shards."""
    made_by = META_FORMAT, ENCODING, tokenizer_identity(tokenizer_name)
    options = val_fraction, shard_tokens, text_field, name, on_bad_document
    return source_key(files, *made_by, *options)


def encode(
    files,
    out: str | Path,
    tokenizer_name: str,
    name: str = "text",
    val_fraction: float = 0.0,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
    text_field: str = "text",
    piece_bytes: int = PIECE_BYTES,
    delay_s: float = 1.0,
    on_bad_document: str = "skip",
    locked: bool = True,
    journal_s: float = JOURNAL_S,
    flags: Flags | None = None,
    note=logging.info,
) -> dict:
    """Encodes `files` (of list_files) into shards in `out` and returns what its meta.json holds.

    Shards are completed aside and renamed into place, meta.json last; without it nothing counts.
    What a stopped encoding has written stays aside, and an equal call goes on behind it.

    Args:
        on_bad_document: "skip" counts and lists what cannot be used, "stop" raises at the first.
        locked: the caller holds lock_folder(out), or knows that nobody else writes there.
        note: called with a line for the user.

    Raises:
        ValueError: no document is left, or too few to hold some out; more than half of the
            documents or bytes cannot be used, or one with "stop"; or the input has changed.
    """
    out, tokenizer = Path(out), build_tokenizer(tokenizer_name)
    before = stamps(files)
    key = encoding_key(
        files, tokenizer_name, val_fraction, shard_tokens, text_field, name, on_bad_document
    )
    out.mkdir(parents=True, exist_ok=True)
    journal, resumable = Journal(out, key, piece_bytes, locked), True
    if journal.replaced:
        note("starting over: the input or an option has changed since an encoding was stopped")
    try:
        if "meta" not in journal.progress:
            units, no_text = plan_units(files, val_fraction, text_field, piece_bytes)
            size = sum(unit.size for unit in units)
            rules = Rules(on_bad_document, val_fraction, flags or Flags(), len(files), size)
            skipped = getattr(files, "left_out", Counter()) + no_text
            stem = name, token_dtype(tokenizer.vocab_size), shard_tokens
            with Encoding(journal, journal_s, stem, skipped, note) as encoding:
                knobs = workers, text_field, piece_bytes, delay_s
                encoding.run_to_end(units, tokenizer, rules, *knobs)
                check_unchanged(files, before)
                journal.write({"meta": _meta(encoding, key, tokenizer, tokenizer_name)})
        _publish(journal.progress["meta"], journal.folder, out, tokenizer_name)
        resumable = False
        return journal.progress["meta"]
    except Refused:
        resumable = False
        raise
    finally:
        journal.close(resumable)


class Encoding:
    """Unfinished shards in the journal's folder, with the counts and the place that they end at."""

    def __init__(self, journal, journal_s, stem, skipped, note):
        """Begins, or goes on behind what the journal describes."""
        self._journal, self._journal_s = journal, journal_s
        self._stem, self._skipped = stem, skipped
        self.writers = {}
        try:
            self._restore(journal.progress)
            note(f"going on with the stopped encoding, {self._done:,} bytes into the input")
        except (KeyError, TypeError, ValueError, OSError):  # nothing to go on with, or damaged
            self._restart(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for writer in self.writers.values():
            writer.abandon()

    def run_to_end(self, units, tokenizer, rules, workers, text_field, piece_bytes, delay_s):
        """Encodes the units; a second time where the draws left a split empty.

        Raises:
            ValueError: the input holds too little text, or too much that cannot be used.
        """
        while True:
            options = Options(text_field, rules.val_fraction, self.forced)
            self._run(units, tokenizer, options, workers, rules, piece_bytes, delay_s)
            forced = self.forced or next_forced(self.totals, rules.val_fraction)
            if forced == self.forced:
                break
            self._restart(forced)
        check_all(self.totals, rules)
        entries = [entry for writer in self.writers.values() for entry in writer.entries]
        text_bytes = sum(entry["text_bytes"] for entry in entries)
        check_lost(self.totals.skipped[LOST], text_bytes, tokenizer.name)

    def _restart(self, forced: Forced | None):
        self.__exit__()
        self.forced, self.totals = forced, Totals(skipped=Counter(self._skipped))
        self._at, self._done = (0, 0), 0
        self.writers = self._open_writers()

    def _open_writers(self):
        name, dtype, shard_tokens = self._stem
        return {s: ShardWriter(self._journal.folder, name, s, dtype, shard_tokens) for s in SPLITS}

    def _restore(self, progress):
        forced, self.totals = progress["forced"], totals_of(progress["totals"])
        self.forced = Forced(*forced) if forced else None
        self._at, self._done = tuple(progress["at"]), progress["done"]
        self.writers = self._open_writers()
        for split, writer in self.writers.items():
            writer.restore(progress["entries"][split])

    def _write_journal(self):
        for writer in self.writers.values():
            writer.flush()
        self._journal.write(
            {
                "forced": self.forced,
                "totals": stored_totals(self.totals),
                "at": self._at,
                "done": self._done,
                "entries": {split: writer.entries for split, writer in self.writers.items()},
            }
        )

    def _run(self, units, tokenizer, options, workers, rules, piece_bytes, delay_s):
        """Encodes the units from where this stands to the end."""
        tasks = _read(units, self._at, options.text_field, piece_bytes)
        written_s = time.monotonic()
        with tqdm(
            total=rules.size,
            initial=self._done,
            desc="encode",
            unit="B",
            unit_scale=True,
            delay=delay_s,
        ) as bar:
            for task, encoded in run_tasks(tasks, tokenizer, options, workers):
                for split, writer in self.writers.items():
                    writer.append(encoded.tokens[split], encoded.sizes[split])
                self.totals.add(encoded)
                if task.problem:
                    self.totals.add_problem(task.problem, task.lost_bytes)
                check_so_far(self.totals, rules)
                self._at, self._done = task.after, self._done + task.size
                bar.update(task.size)
                if time.monotonic() - written_s >= self._journal_s:
                    self._write_journal()
                    written_s = time.monotonic()
        for writer in self.writers.values():
            writer.close()


def _read(units, at, text_field, piece_bytes):
    """The tasks behind `at`, a unit and the tasks of it that are done."""
    for number in range(at[0], len(units)):
        unit, done = units[number], 0
        skip = at[1] if number == at[0] else 0
        for i, task in enumerate(read_unit(unit, text_field, piece_bytes)):
            done += task.size
            lost = (
                unit.size - done if task.problem and task.problem.reason != TOO_LONG.reason else 0
            )
            if i >= skip:
                yield task._replace(after=(number, i + 1), lost_bytes=lost)


def _meta(encoding, key, tokenizer, tokenizer_name) -> dict:
    totals = encoding.totals
    return {
        "format": META_FORMAT,
        "source": key,
        # A tokenizer.json goes with the shards, so that a moved folder stays whole.
        "tokenizer": "tokenizer.json" if Path(tokenizer_name).is_file() else tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "documents": dict(sorted(totals.documents.items())),
        "skipped": dict(sorted(totals.skipped.items())),
        "problems": totals.describe_problems(),
        "shards": [entry for writer in encoding.writers.values() for entry in writer.entries],
    }


def _publish(meta, folder, out, tokenizer_name) -> None:
    for entry in meta["shards"]:
        if (folder / entry["file"]).exists():  # else an encoding that was stopped here moved it
            os.replace(folder / entry["file"], out / entry["file"])
    if meta["tokenizer"] == "tokenizer.json":
        write_atomic(out / "tokenizer.json", Path(tokenizer_name).read_bytes())
    write_atomic(out / "meta.json", json.dumps(meta, indent=1) + "\n")

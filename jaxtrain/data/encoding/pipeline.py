"""Encodes files into token shards: reads units in order, encodes in processes, writes in order.

The result depends neither on the number of processes nor on how the input is divided. An encoding
that was stopped continues where its journal ends.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging
from tqdm import tqdm

from jaxtrain.data.encoding.counts import Counts, Flags, Rules, check_all, check_so_far
from jaxtrain.data.encoding.divide_input import divide_input
from jaxtrain.data.encoding.documents import TOO_LONG, Options, token_dtype
from jaxtrain.data.encoding.held_out import SPLITS, ForcedSplit, find_forced
from jaxtrain.data.encoding.input_files import (
    InputFiles,
    check_unchanged,
    file_stamps,
    input_key,
)
from jaxtrain.data.encoding.journal import Journal
from jaxtrain.data.encoding.readers import read_unit
from jaxtrain.data.encoding.roundtrip import LOST, UnusableInput, check_lost_share
from jaxtrain.data.encoding.work_units import PIECE_BYTES, Task, Unit
from jaxtrain.data.encoding.workers import encode_tasks
from jaxtrain.data.metadata import META_FILE, META_FORMAT
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_identity
from jaxtrain.files import write_atomic

ENCODING = 3  # incremented when the same input gives other tokens
SHARD_TOKENS = 100_000_000
JOURNAL_S = 10.0  # between writes of the journal: how much work a kill can cost


def encoding_key(
    files: InputFiles,
    tokenizer_name: str,
    val_fraction: float,
    shard_tokens: int,
    text_field: str,
    name: str,
    on_bad_document: str = "skip",
) -> str:
    """Returns a key of the input and the options: encodings with equal keys give equal shards."""
    made_by = META_FORMAT, ENCODING, tokenizer_identity(tokenizer_name)
    options = val_fraction, shard_tokens, text_field, name, on_bad_document
    return input_key(files, *made_by, *options)


def encode(
    files: InputFiles,
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
    note: Callable[[str], object] = logging.info,
) -> dict:
    """Encodes files into shards in `out` and returns what its meta.json holds.

    Shards are completed in a hidden folder and renamed into place, meta.json last: without it they
    do not count. What a stopped encoding has written stays in that folder, and a call with the
    same arguments continues from it.

    Args:
        delay_s: seconds before a progress bar is shown.
        on_bad_document: "skip" counts and lists what cannot be used, "stop" raises at the first.
        locked: whether the caller has lock_folder(out), or knows that nobody else writes there.
        note: called with a line for the user.

    Raises:
        ValueError: no document is left, or too few to hold some out; more than half of the
            documents or bytes cannot be used, or one with "stop"; or the input has changed.
    """
    out, tokenizer = Path(out), build_tokenizer(tokenizer_name)
    before = file_stamps(files)
    key = encoding_key(
        files, tokenizer_name, val_fraction, shard_tokens, text_field, name, on_bad_document
    )
    out.mkdir(parents=True, exist_ok=True)
    journal, resumable = Journal(out, key, piece_bytes, locked), True
    if journal.replaced:
        note("starting over: the input or an option has changed since an encoding was stopped")
    try:
        if "meta" not in journal.progress:
            units, without_text = divide_input(files, val_fraction, text_field, piece_bytes)
            size = sum(unit.size for unit in units)
            rules = Rules(on_bad_document, val_fraction, flags or Flags(), len(files), size)
            skipped = files.left_out + without_text
            new_writer = lambda split: ShardWriter(
                journal.folder, name, split, token_dtype(tokenizer.vocab_size), shard_tokens
            )
            with Encoding(journal, journal_s, new_writer, skipped, note) as encoding:
                encoding.encode_all(
                    units, tokenizer, rules, workers, text_field, piece_bytes, delay_s
                )
                check_unchanged(files, before)
                journal.write({"meta": _metadata(encoding, key, tokenizer, tokenizer_name)})
        _publish(journal.progress["meta"], journal.folder, out, tokenizer_name)
        resumable = False
        return journal.progress["meta"]
    except UnusableInput:
        resumable = False
        raise
    finally:
        journal.close(resumable)


class Encoding:
    """An encoding in progress: its unfinished shards, its counts, and its place in the input.

    Attributes:
        counts: over everything encoded so far.
        writers: a ShardWriter for each split.
    """

    def __init__(
        self,
        journal: Journal,
        journal_s: float,
        new_writer: Callable[[str], ShardWriter],
        skipped: Counter,
        note: Callable[[str], object],
    ):
        """Continues from what the journal describes, or begins."""
        self._journal, self._journal_s = journal, journal_s
        self._new_writer, self._skipped = new_writer, skipped
        self.writers: dict[str, ShardWriter] = {}
        try:
            self._restore(journal.progress)
            note(f"continuing the stopped encoding, {self._read_bytes:,} bytes into the input")
        except (KeyError, TypeError, ValueError, OSError):  # no journal, or a damaged one
            self._restart(None)

    def __enter__(self) -> "Encoding":
        return self

    def __exit__(self, *_) -> None:
        for writer in self.writers.values():
            writer.abandon()

    def encode_all(
        self,
        units: list[Unit],
        tokenizer: Tokenizer,
        rules: Rules,
        workers: int,
        text_field: str,
        piece_bytes: int,
        delay_s: float,
    ) -> None:
        """Encodes all units; does it a second time if no document is in one of the splits.

        Raises:
            ValueError: the input holds too little text, or too much that cannot be used.
        """
        while True:
            options = Options(text_field, rules.val_fraction, self._forced)
            tasks = _iter_tasks(units, self._place, text_field, piece_bytes)
            self._encode_tasks(tasks, tokenizer, options, workers, rules, delay_s)
            counts = self.counts
            forced = find_forced(counts.documents, counts.drawn, rules.val_fraction)
            if self._forced or not forced:
                break
            self._restart(forced)
        check_all(self.counts, rules)
        entries = [entry for writer in self.writers.values() for entry in writer.entries]
        text_bytes = sum(entry["text_bytes"] for entry in entries)
        check_lost_share(self.counts.skipped[LOST], text_bytes, tokenizer.name)

    def _restart(self, forced: ForcedSplit | None) -> None:
        for writer in self.writers.values():
            writer.abandon()
        self._forced, self.counts = forced, Counts(skipped=Counter(self._skipped))
        self._place, self._read_bytes = (0, 0), 0
        self.writers = {split: self._new_writer(split) for split in SPLITS}

    def _restore(self, progress: dict) -> None:
        forced, self.counts = progress["forced"], Counts.from_json(progress["totals"])
        self._forced = ForcedSplit(*forced) if forced else None
        self._place, self._read_bytes = tuple(progress["at"]), progress["done"]
        self.writers = {split: self._new_writer(split) for split in SPLITS}
        for split, writer in self.writers.items():
            writer.restore(progress["entries"][split])

    def _write_journal(self) -> None:
        for writer in self.writers.values():
            writer.flush()
        self._journal.write(
            {
                "forced": self._forced,
                "totals": self.counts.to_json(),
                "at": self._place,
                "done": self._read_bytes,
                "entries": {split: writer.entries for split, writer in self.writers.items()},
            }
        )

    def _encode_tasks(
        self,
        tasks: Iterator[Task],
        tokenizer: Tokenizer,
        options: Options,
        workers: int,
        rules: Rules,
        delay_s: float,
    ) -> None:
        written_s = time.monotonic()
        with tqdm(
            total=rules.size,
            initial=self._read_bytes,
            desc="encode",
            unit="B",
            unit_scale=True,
            delay=delay_s,
        ) as bar:
            for task, encoded in encode_tasks(tasks, tokenizer, options, workers):
                for split, writer in self.writers.items():
                    writer.append(encoded.tokens[split], encoded.sizes[split])
                self.counts.add(encoded)
                if task.problem:
                    self.counts.add_problem(task.problem, task.lost_bytes)
                check_so_far(self.counts, rules)
                self._place, self._read_bytes = task.after, self._read_bytes + task.size
                bar.update(task.size)
                if time.monotonic() - written_s >= self._journal_s:
                    self._write_journal()
                    written_s = time.monotonic()
        for writer in self.writers.values():
            writer.close()


def _iter_tasks(
    units: list[Unit], place: tuple[int, int], text_field: str, piece_bytes: int
) -> Iterator[Task]:
    """Yields the tasks after `place`, the number of a unit and how many of its tasks are done."""
    first_unit, tasks_done = place
    for number in range(first_unit, len(units)):
        unit, read = units[number], 0
        skip = tasks_done if number == first_unit else 0
        for i, task in enumerate(read_unit(unit, text_field, piece_bytes)):
            read += task.size
            lost = 0
            if task.problem and task.problem.reason != TOO_LONG.reason:
                lost = unit.size - read  # a problem ends its unit
            if i >= skip:
                yield task._replace(after=(number, i + 1), lost_bytes=lost)


def _metadata(encoding: Encoding, key: str, tokenizer: Tokenizer, tokenizer_name: str) -> dict:
    counts = encoding.counts
    return {
        "format": META_FORMAT,
        "source": key,
        # A tokenizer.json is copied beside the shards, so that the folder can be moved.
        "tokenizer": "tokenizer.json" if Path(tokenizer_name).is_file() else tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "documents": dict(sorted(counts.documents.items())),
        "skipped": dict(sorted(counts.skipped.items())),
        "problems": counts.describe_problems(),
        "shards": [entry for writer in encoding.writers.values() for entry in writer.entries],
    }


def _publish(metadata: dict, folder: Path, out: Path, tokenizer_name: str) -> None:
    """Moves finished shards from the journal's folder to `out`, then writes meta.json."""
    for entry in metadata["shards"]:
        if (folder / entry["file"]).exists():  # a stopped call may have moved it
            os.replace(folder / entry["file"], out / entry["file"])
    if metadata["tokenizer"] == "tokenizer.json":
        write_atomic(out / "tokenizer.json", Path(tokenizer_name).read_bytes())
    write_atomic(out / META_FILE, json.dumps(metadata, indent=1) + "\n")

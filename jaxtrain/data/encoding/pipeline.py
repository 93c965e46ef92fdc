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

from jaxtrain.data.encoding.counts import Counts, check_all, check_so_far
from jaxtrain.data.encoding.divide_input import divide_input
from jaxtrain.data.encoding.documents import TOO_LONG, token_dtype
from jaxtrain.data.encoding.held_out import SPLITS, ForcedSplit, find_forced
from jaxtrain.data.encoding.input_files import InputFiles, check_unchanged, file_stamps
from jaxtrain.data.encoding.journal import Journal
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.readers import read_unit
from jaxtrain.data.encoding.roundtrip import LOST, UnusableInput, check_lost_share
from jaxtrain.data.encoding.work_units import Task, Unit
from jaxtrain.data.encoding.workers import encode_tasks
from jaxtrain.data.metadata import META_FILE, META_FORMAT
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.data.tokenizer import Tokenizer, build_tokenizer
from jaxtrain.files import write_atomic


def encode(
    files: InputFiles,
    out: str | Path,
    options: EncodeOptions,
    locked: bool = True,
    note: Callable[[str], object] = logging.info,
) -> dict:
    """Encodes files into shards in `out` and returns the content of meta.json.

    Shards are completed in a hidden folder and then renamed into place. meta.json is written last;
    shards without it are ignored. What a stopped encoding has written stays in the hidden folder,
    and a call with the same arguments continues from it.

    Args:
        locked: whether the caller has lock_folder(out), or knows that nobody else writes there.
        note: prints a line for the user.

    Raises:
        ValueError: there are too few documents; more than half of the documents or bytes cannot be
            used, or any document with on_bad_document="stop"; or the input has changed.
    """
    out, before, key = Path(out), file_stamps(files), options.key(files)
    out.mkdir(parents=True, exist_ok=True)
    journal, resumable = Journal(out, key, options.piece_bytes, locked), True
    if journal.replaced:
        note("starting over: the input or an option has changed since an encoding was stopped")
    try:
        if "meta" not in journal.progress:
            units, without_text = divide_input(
                files,
                options.val_fraction,
                options.text_field,
                build_tokenizer(options.tokenizer),
                options.piece_bytes,
            )
            with Encoding(journal, options, files.left_out + without_text, note) as encoding:
                encoding.encode_all(units, len(files))
                check_unchanged(files, before)
                journal.write({"meta": encoding.metadata(key)})
        _publish(journal.progress["meta"], journal.folder, out, options.tokenizer)
        resumable = False
        return journal.progress["meta"]
    except UnusableInput:
        resumable = False
        raise
    finally:
        journal.close(resumable)


class Encoding:
    """An encoding in progress: its unfinished shards, its counts, and its place in the input."""

    def __init__(
        self,
        journal: Journal,
        options: EncodeOptions,
        skipped: Counter,
        note: Callable[[str], object],
    ):
        """Continues the encoding that the journal describes, or starts a new one.

        Args:
            skipped: the files without text, by reason.
        """
        self._journal, self._options, self._skipped = journal, options, skipped
        self._tokenizer = build_tokenizer(options.tokenizer)
        self._writers: dict[str, ShardWriter] = {}
        try:
            self._restore(journal.progress)
            note(f"continuing the stopped encoding, {self._read_bytes:,} bytes into the input")
        except (KeyError, TypeError, ValueError, OSError):  # no journal, or a damaged one
            self._restart(None)

    def __enter__(self) -> "Encoding":
        return self

    def __exit__(self, *_) -> None:
        for writer in self._writers.values():
            writer.abandon()

    def encode_all(self, units: list[Unit], files: int) -> None:
        """Encodes all units, and a second time if one of the splits got no document.

        Raises:
            ValueError: the input has too little text, or too much that cannot be used.
        """
        size = sum(unit.size for unit in units)
        while True:
            self._encode_once(units, size)
            counts = self._counts
            forced = find_forced(counts.documents, counts.drawn, self._options.val_fraction)
            if self._forced or not forced:
                break
            self._restart(forced)
        check_all(self._counts, self._options, files, size)
        text_bytes = sum(entry["text_bytes"] for entry in self._entries())
        check_lost_share(self._counts.skipped[LOST], text_bytes, self._tokenizer.name)

    def metadata(self, key: str) -> dict:
        """Returns the content of meta.json."""
        # A tokenizer.json is copied into the same folder, so that the folder can be moved.
        is_file = Path(self._options.tokenizer).is_file()
        return {
            "format": META_FORMAT,
            "source": key,
            "tokenizer": "tokenizer.json" if is_file else self._tokenizer.name,
            "vocab_size": self._tokenizer.vocab_size,
            "eot": self._tokenizer.eot,
            "documents": dict(sorted(self._counts.documents.items())),
            "skipped": dict(sorted(self._counts.skipped.items())),
            "problems": self._counts.describe_problems(),
            "shards": self._entries(),
        }

    def _entries(self) -> list[dict]:
        return [entry for writer in self._writers.values() for entry in writer.entries]

    def _restart(self, forced: ForcedSplit | None) -> None:
        for writer in self._writers.values():
            writer.abandon()
        self._forced, self._counts = forced, Counts(skipped=Counter(self._skipped))
        self._place, self._read_bytes = (0, 0), 0
        self._writers = self._new_writers()

    def _new_writers(self) -> dict[str, ShardWriter]:
        folder, name = self._journal.folder, self._options.name
        rest = token_dtype(self._tokenizer.vocab_size), self._options.shard_tokens
        return {split: ShardWriter(folder, name, split, *rest) for split in SPLITS}

    def _restore(self, progress: dict) -> None:
        forced, self._counts = progress["forced"], Counts.from_json(progress["totals"])
        self._forced = ForcedSplit(*forced) if forced else None
        self._place, self._read_bytes = tuple(progress["at"]), progress["done"]
        self._writers = self._new_writers()
        for split, writer in self._writers.items():
            writer.restore(progress["entries"][split])

    def _write_journal(self) -> None:
        for writer in self._writers.values():
            writer.flush()
        self._journal.write(
            {
                "forced": self._forced,
                "totals": self._counts.to_json(),
                "at": self._place,
                "done": self._read_bytes,
                "entries": {split: writer.entries for split, writer in self._writers.items()},
            }
        )

    def _encode_once(self, units: list[Unit], size: int) -> None:
        options, written_s = self._options, time.monotonic()
        tasks = _iter_tasks(units, self._place, options, self._tokenizer)
        bar_options = {"desc": "encode", "unit": "B", "unit_scale": True}
        bar_options |= {"initial": self._read_bytes, "delay": options.bar_delay_s}
        with tqdm(total=size, **bar_options) as bar:
            for task, encoded in encode_tasks(tasks, self._tokenizer, options, self._forced):
                for split, writer in self._writers.items():
                    writer.append(encoded.tokens[split], encoded.sizes[split])
                self._counts.add(encoded)
                if task.problem:
                    self._counts.add_problem(task.problem, task.lost_bytes)
                check_so_far(self._counts, options)
                self._place, self._read_bytes = task.after, self._read_bytes + task.size
                bar.update(task.size)
                if time.monotonic() - written_s >= options.journal_s:
                    self._write_journal()
                    written_s = time.monotonic()
        for writer in self._writers.values():
            writer.close()


def _iter_tasks(
    units: list[Unit], place: tuple[int, int], options: EncodeOptions, tokenizer: Tokenizer
) -> Iterator[Task]:
    """Yields the tasks after `place`: (number of a unit, how many of its tasks are done)."""
    first_unit, tasks_done = place
    for number in range(first_unit, len(units)):
        unit, read = units[number], 0
        skip = tasks_done if number == first_unit else 0
        tasks = read_unit(unit, options.text_field, options.piece_bytes, tokenizer)
        for i, task in enumerate(tasks):
            read += task.size
            lost = 0
            if task.problem and task.problem.reason != TOO_LONG.reason:
                lost = unit.size - read  # a problem ends its unit
            if i >= skip:
                yield task._replace(after=(number, i + 1), lost_bytes=lost)


def _publish(metadata: dict, folder: Path, out: Path, tokenizer_name: str) -> None:
    """Moves finished shards from the journal's folder to `out`, then writes meta.json."""
    for entry in metadata["shards"]:
        if (folder / entry["file"]).exists():  # a stopped call may have moved it
            os.replace(folder / entry["file"], out / entry["file"])
    if metadata["tokenizer"] == "tokenizer.json":
        write_atomic(out / "tokenizer.json", Path(tokenizer_name).read_bytes())
    write_atomic(out / META_FILE, json.dumps(metadata, indent=1) + "\n")

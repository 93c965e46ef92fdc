"""Text to token shards: `python -m jaxtrain.data.encode --help`."""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import uuid
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from jaxtrain.data.shards import MAX_SHARD_TOKENS, ShardWriter
from jaxtrain.data.text import (
    PIECE_BYTES,
    encode_pieces,
    list_files,
    plan_pieces,
    source_key,
    token_dtype,
)
from jaxtrain.data.tokenizer import build_tokenizer, tokenizer_identity
from jaxtrain.disk import ends_in_one_line
from jaxtrain.files import write_atomic

META_FORMAT = 1
SHARD_TOKENS = 100_000_000

HELP = """\
Turns text into llm.c token shards, which `--config.data.shards=DIR` trains on:

  python -m jaxtrain.data.encode --input books/ --out shards/ --tokenizer gpt2
  python -m jaxtrain.train --config=configs/gpt_124m.py --config.data.shards=shards

INPUT is a UTF-8 text file, a .jsonl file with a document a line, or a folder of both. A text file
is one document. Each document starts with the tokenizer's end-of-text token. Files that are not
UTF-8 or hold NUL bytes are no text: they are skipped and counted.

DIR receives NAME_train_000000.bin, NAME_val_000000.bin, ... (256 int32 of header, then uint16
tokens; uint32 where the vocabulary needs it) and meta.json: tokenizer, vocabulary size, eot, and
each shard's tokens, text bytes and fingerprint. The result is the same for any --workers.
"""


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
) -> dict:
    """Encodes `files` (of list_files) into shards in `out` and returns what its meta.json holds.

    Shards are completed aside and renamed into place, meta.json last; without it nothing counts.

    Raises:
        ValueError: no document is left, or a line of a .jsonl file is not as announced.
    """
    out = Path(out)
    tokenizer = build_tokenizer(tokenizer_name)
    key = encoding_key(files, tokenizer_name, val_fraction, shard_tokens, text_field, name)
    tasks, skipped = plan_pieces(files, val_fraction, piece_bytes)
    aside = out / f".encoding-{uuid.uuid4().hex[:12]}"
    aside.mkdir(parents=True)
    try:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = {s: ShardWriter(aside, name, s, dtype, shard_tokens) for s in ("train", "val")}
        options = tokenizer_name, text_field, val_fraction
        total = sum(piece.stop - piece.start for task in tasks for piece in task)
        with tqdm(total=total, desc="encode", unit="B", unit_scale=True, delay=delay_s) as bar:
            for task, encoded in _run(tasks, tokenizer, options, workers):
                for split, writer in writers.items():
                    writer.append(encoded.tokens[split], encoded.sizes[split])
                skipped += encoded.skipped
                bar.update(sum(piece.stop - piece.start for piece in task))
        for writer in writers.values():
            writer.close()
        entries = [entry for writer in writers.values() for entry in writer.entries]
        if not entries:
            raise ValueError(
                "text must hold at least one document of UTF-8 without NUL bytes; got "
                f"{len(files)} files, {describe_skipped(skipped)}. "
                "Set --config.data.text (--input)."
            )
        return _publish(entries, aside, out, key, tokenizer, skipped)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(entries, aside, out, key, tokenizer, skipped) -> dict:
    meta = {
        "format": META_FORMAT,
        "source": key,
        "tokenizer": _keep_tokenizer(tokenizer.name, out),
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "skipped": dict(sorted(skipped.items())),
        "shards": entries,
    }
    for entry in entries:
        os.replace(aside / entry["file"], out / entry["file"])
    write_atomic(out / "meta.json", json.dumps(meta, indent=1) + "\n")
    return meta


def encoding_key(files, tokenizer_name, val_fraction, shard_tokens, text_field, name) -> str:
    """Stands for what an encoding is made of; equal keys make equal shards."""
    identity = tokenizer_identity(tokenizer_name)
    return source_key(files, META_FORMAT, identity, val_fraction, shard_tokens, text_field, name)


def describe_skipped(skipped) -> str:
    """`skipped 3 not UTF-8, 1 empty`, or nothing skipped."""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    return f"skipped {counts}" if counts else "nothing skipped"


def _keep_tokenizer(tokenizer_name, out) -> str:
    """A tokenizer.json goes with the shards, so that a moved folder stays whole."""
    if not Path(tokenizer_name).is_file():
        return tokenizer_name
    write_atomic(out / "tokenizer.json", Path(tokenizer_name).read_bytes())
    return "tokenizer.json"


def _run(tasks, tokenizer, options, workers):
    """(task, Encoded) in the order of tasks; at most 2 x workers results wait in memory."""
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, encode_pieces(task, tokenizer, *options[1:])
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads' locks
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, context, _start_worker, options) as pool:
        waiting = deque()
        try:
            for task in tasks:
                waiting.append((task, pool.submit(_work, task)))
                if len(waiting) > 2 * workers:
                    task, future = waiting.popleft()
                    yield task, future.result()
            while waiting:
                task, future = waiting.popleft()
                yield task, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer_name, text_field, val_fraction):
    global _worker
    _worker = build_tokenizer(tokenizer_name), text_field, val_fraction


def _work(task):
    return encode_pieces(task, *_worker)


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m jaxtrain.data.encode",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, help="text file, .jsonl file or folder")
    add("--out", required=True, help="folder for the shards; made if missing")
    add("--tokenizer", required=True, help="bytes, gpt2 or the path of a tokenizer.json")
    add("--name", help="first part of the files' names; default: the input's name")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens a shard; %(default)s")
    add("--val_fraction", type=float, default=0.01, help="share held out; %(default)s")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; all %(default)s cores")
    add("--text_field", default="text", help="key of a .jsonl line's text; %(default)s")
    add("--overwrite", action="store_true", help="replace the shards that DIR holds")
    args = parser.parse_args(argv)
    if not 0 <= args.val_fraction <= 0.5:
        parser.error(f"--val_fraction must be in [0, 0.5]; got {args.val_fraction}.")
    if not 0 < args.shard_tokens <= MAX_SHARD_TOKENS:
        parser.error(f"--shard_tokens must be in 1..{MAX_SHARD_TOKENS}; got {args.shard_tokens}.")
    if args.workers < 1:
        parser.error(f"--workers must be at least 1; got {args.workers}.")
    return args


def _held_shards(out: Path, overwrite: bool) -> list[Path]:
    """Shards of an earlier encoding in `out`; any other there ends the program."""
    held = sorted(out.glob("*.bin"))
    if held and not overwrite:
        sys.exit(f"--out must hold no shards; got {held[0]}. Choose another, or add --overwrite.")
    try:
        meta = json.loads((out / "meta.json").read_text())
        ours = {entry["file"] for entry in meta["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    foreign = [path for path in held if path.name not in ours]
    if foreign:
        sys.exit(f"--overwrite replaces what meta.json lists; got {foreign[0]}. Choose another.")
    return held


@ends_in_one_line()
def main(argv=None) -> None:
    args = _parse(argv)
    out = Path(args.out)
    held = _held_shards(out, args.overwrite)
    name = args.name or Path(args.input).resolve().stem
    try:
        meta = encode(
            list_files(args.input, exclude=out),
            out,
            args.tokenizer,
            name,
            args.val_fraction,
            args.shard_tokens,
            args.workers,
            args.text_field,
            delay_s=0,
        )
    except ValueError as error:
        sys.exit(str(error))
    except BrokenProcessPool:
        sys.exit("an encoding process was killed, most likely for memory. Lower --workers.")
    except KeyboardInterrupt:
        sys.exit(f"stopped; {out} is as it was.")
    written = {entry["file"] for entry in meta["shards"]}
    for path in held:
        if path.name not in written:
            path.unlink()
    for split in ("train", "val"):
        shards = [entry for entry in meta["shards"] if entry["split"] == split]
        tokens, text = (sum(s[key] for s in shards) for key in ("tokens", "text_bytes"))
        print(f"{split}: {tokens:,} tokens of {text:,} text bytes in {len(shards)} shards")
    print(f"{out}: tokenizer {args.tokenizer}, {describe_skipped(meta['skipped'])}")


if __name__ == "__main__":
    main()

"""The command that turns text into token shards: `python -m jaxtrain.data.encode --help`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from jaxtrain.config.commands import rewrite_commands
from jaxtrain.config.shell_commands import shell_command
from jaxtrain.data.encoding.counts import describe_skipped
from jaxtrain.data.encoding.formats import SUFFIXES, printable_path
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.journal import PROGRESS, STATE, lock_folder
from jaxtrain.data.encoding.options import SHARD_TOKENS, EncodeOptions, Flags
from jaxtrain.data.encoding.pipeline import encode
from jaxtrain.data.metadata import META_FILE
from jaxtrain.data.shards import MAX_SHARD_TOKENS
from jaxtrain.data.tokenizer import Tokenizer, build_tokenizer
from jaxtrain.errors import INTERRUPTED
from jaxtrain.file_errors import exit_on_file_error
from pallas_kernels.arguments import Parser

FLAGS = Flags("--input", "--text_field")
BATCH_TOKENS = 8 * (256 + 1)  # of configs/quickstart.py
VOCABULARY_STEP = 64  # model.V is rounded up to a multiple, which suits matrix units

HELP = """\
Turns text into token shards, which `jaxtrain train CONFIG --data.shards=DIR` trains on.

    jaxtrain encode --input=docs --out=runs/docs_gpt2 --tokenizer=gpt2
    jaxtrain encode --input=docs --out=runs/docs_bytes --tokenizer=bytes --val_fraction=0.1
    jaxtrain encode --input=README.md --out=runs/readme --tokenizer=gpt2 --name=readme

INPUT is a file, or a folder with everything below it; a folder may contain several formats. The
format of a file is recognised by its content:
  UTF-8 text           a file is a document
  JSON lines           a line is a document: the string under --text_field
  JSON array           an element is a document: an object with --text_field, or a string
  CSV, TSV             a row is a document; a .csv or .tsv file with a header, column --text_field
  parquet, Arrow IPC   a row is a document, column --text_field
The first four may be compressed with gzip or zstd. Other files without text are skipped and
counted. Links to folders are followed.

For validation, about --val_fraction of the text is held out, and at least one document: whole text
files or the end of the largest one, single lines, and single rows. The choice depends only on the
file's name and the document's place in the file.

Memory stays bounded, at about 300 MB a process, whatever the size of the input. All cores encode;
the result is the same for any --workers.

If an encoding is stopped, even by kill -9 or a power cut, the same command continues it, and the
result is as if it had not been stopped. If the input or an option has changed, the command prints
that it starts over.

A document that cannot be used is skipped: a line that is not JSON, a damaged row group, the rest of
a truncated file, a text that the tokenizer refuses. The command prints how many were skipped and
where the first of them are. If more than half of the documents or bytes cannot be used, the command
fails. With --on_bad_document=stop it fails at the first one.

DIR receives NAME_train_000000.bin, NAME_val_000000.bin, ... (256 int32 of header, then uint16
tokens, or uint32 for vocabularies that need it) and meta.json: tokenizer, vocabulary size, eot, and
each shard's tokens, text bytes and fingerprint. Each document starts with the tokenizer's
end-of-text token.
"""


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(prog, rewrite_commands(HELP, prog))
    add = parser.add_argument
    add("--input", required=True, help="file or folder of text")
    add("--out", required=True, help="folder for the shards; created if missing")
    add("--tokenizer", required=True, help="bytes, gpt2 or the path of a tokenizer.json")
    add("--name", help="first part of the shards' names; default: the input's name")
    add("--text_field", default="text", help="key or column of the text; default: %(default)s")
    add("--val_fraction", type=float, default=0.01, help="share held out; default: %(default)s")
    add(
        "--shard_tokens",
        type=int,
        default=SHARD_TOKENS,
        help="tokens per shard; default: %(default)s",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    add(
        "--on_bad_document",
        choices=("skip", "stop"),
        default="skip",
        help="skip and count a document that cannot be used, or stop there; default: %(default)s",
    )
    add("--overwrite", action="store_true", help="replace the shards in DIR")
    args = parser.parse_args(argv)
    if not 0 <= args.val_fraction <= 0.5:
        parser.error(f"--val_fraction must be in [0, 0.5]; got {args.val_fraction}.")
    if not 0 < args.shard_tokens <= MAX_SHARD_TOKENS:
        parser.error(f"--shard_tokens must be in 1..{MAX_SHARD_TOKENS}; got {args.shard_tokens}.")
    if args.workers < 1:
        parser.error(f"--workers must be at least 1; got {args.workers}.")
    if args.name is not None and (not args.name or args.name[0] == "." or "/" in args.name):
        parser.error(f"--name must be the beginning of a file's name; got {args.name!r}.")
    return args


def _exit(reason: object) -> NoReturn:
    """Ends the program with a one-line error."""
    sys.exit(f"error: {reason}")


def _default_name(source: str) -> str:
    """Returns the input's name without suffixes, as the first part of the shards' names."""
    path = Path(source).expanduser().resolve()
    name = path.name
    for suffixes in SUFFIXES.values():
        for suffix in suffixes:
            name = name.removesuffix(suffix)
    if not path.is_dir():
        name = Path(name).stem
    # ASCII only, so that it is the same in every locale. A name like "val" is safe, because the
    # name of the split is appended.
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._-") or "text"


def _find_replaceable_shards(out: Path, overwrite: bool) -> list[Path]:
    """Returns the shards of an earlier encoding in `out`; ends the program if it finds others."""
    shards = sorted(out.glob("*.bin"))
    listed = _listed_shards(out / META_FILE, "shards")
    # An encoding that was stopped while it moved its shards here lists them in its journal.
    journals = out.glob(f"{STATE}*/{PROGRESS}")
    moved = set().union(*(_listed_shards(path, "progress", "meta", "shards") for path in journals))
    finished = [path for path in shards if path.name not in moved]
    if finished and not overwrite:
        found = printable_path(finished[0])
        _exit(f"--out must contain no shards; got {found}. Choose another, or add --overwrite.")
    if foreign := [path for path in finished if path.name not in listed]:
        found = printable_path(foreign[0])
        _exit(
            "--overwrite only replaces shards that meta.json lists; got another one, "
            f"{found}. Choose another --out."
        )
    return shards


def _listed_shards(path: Path, *keys: str) -> set[str]:
    """Returns the names of the shards that a JSON file lists under the keys, or none."""
    try:
        entries = json.loads(path.read_text())
        for key in keys:
            entries = entries[key]
        return {entry["file"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _build_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer; an error ends the program and names this command's flag."""
    try:
        return build_tokenizer(name)
    except ValueError as error:
        message = str(error).replace("--data.tokenizer", "--tokenizer")
        _exit(message.replace("data.tokenizer", "--tokenizer"))


def _train_command(out: Path, name: str, meta: dict) -> str:
    """Returns a command that trains on the shards, on any machine."""
    arguments = ["quickstart", f"--data.shards={out}"]
    vocabulary = -(-meta["vocab_size"] // VOCABULARY_STEP) * VOCABULARY_STEP
    if vocabulary != 256:
        arguments.append(f"--model.V={vocabulary}")
    tokens = sum(e["tokens"] for e in meta["shards"] if e["split"] == "train")
    if tokens < BATCH_TOKENS:
        arguments += ["--data.batch=1", f"--data.seq_len={max(1, min(256, tokens - 1))}"]
    return shell_command("train", *arguments, f"--workdir={_new_folder(Path('runs', name))}")


def _new_folder(path: Path) -> Path:
    """Returns the path, numbered if it exists, because it may be a run on other data."""
    numbered = (path.with_name(f"{path.name}_{i}") for i in range(2, 1_000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def _print_summary(
    args: argparse.Namespace, out: Path, name: str, tokenizer: Tokenizer, meta: dict
) -> None:
    for split in ("train", "val"):
        shards = [entry for entry in meta["shards"] if entry["split"] == split]
        tokens, text = (sum(s[key] for s in shards) for key in ("tokens", "text_bytes"))
        documents = meta["documents"].get(split, 0)
        print(
            f"{split}: {documents:,} document(s), {tokens:,} tokens from {text:,} bytes of text, "
            f"in {len(shards)} shard(s)"
        )
    print(f"The shards are in {printable_path(out)}, encoded with tokenizer {args.tokenizer}.")
    print(describe_skipped(meta["skipped"]))
    for problem in meta["problems"]:
        print(f"  {problem}")
    for note in tokenizer.notes:
        print(f"{args.tokenizer}: {note}")
    if args.val_fraction:
        print(f"To train on them, run:\n  {_train_command(out, name, meta)}")
    else:
        print(
            "No text is held out, but training needs a held-out shard. Encode again with "
            "--val_fraction=0.01, or add a shard with 'val' in its name to the folder."
        )


@exit_on_file_error()
def main(argv: Sequence[str] | None = None, prog: str = "python -m jaxtrain.data.encode") -> None:
    """Runs the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # prints any name in any locale
    args = _parse(argv, prog)
    out, name = Path(args.out), args.name or _default_name(args.input)
    tokenizer = _build_tokenizer(args.tokenizer)
    try:
        files = list_files(args.input, exclude=out, flag="--input")
        with lock_folder(out) as locked:
            replaceable = _find_replaceable_shards(out, args.overwrite)
            options = EncodeOptions(
                args.tokenizer,
                name,
                args.val_fraction,
                args.shard_tokens,
                args.text_field,
                args.on_bad_document,
                args.workers,
                bar_delay_s=0,
                flags=FLAGS,
            )
            meta = encode(files, out, options, locked, lambda line: print(line, file=sys.stderr))
            written = {entry["file"] for entry in meta["shards"]}
            for path in replaceable:
                if path.name not in written:
                    path.unlink()
    except ValueError as error:
        _exit(error)
    except BrokenProcessPool:
        _exit(
            "an encoding process was killed, most likely because memory ran out. Run the same "
            "command with fewer --workers: it continues where this one stopped."
        )
    except KeyboardInterrupt:
        unchanged = f"The shards in {printable_path(out)} are unchanged."
        print(f"stopped; run the same command to continue. {unchanged}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    _print_summary(args, out, name, tokenizer, meta)


if __name__ == "__main__":
    main()

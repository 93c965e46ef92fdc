"""Text to token shards: `python -m jaxtrain.data.encode --help`."""

import argparse
import json
import os
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from jaxtrain.config.commands import rewrite_commands
from jaxtrain.config.shell_commands import shell_command
from jaxtrain.data.encoding.counts import Flags, describe_skipped
from jaxtrain.data.encoding.formats import SUFFIXES, shown
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.journal import PROGRESS, STATE, lock_folder
from jaxtrain.data.encoding.pipeline import SHARD_TOKENS, encode
from jaxtrain.data.shards import MAX_SHARD_TOKENS
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.errors import INTERRUPTED
from jaxtrain.file_errors import exit_on_file_error
from pallas_kernels.arguments import Parser

FLAGS = Flags("--input", "--text_field", "--val_fraction")
FEW_TOKENS = 8 * (256 + 1)  # a batch of configs/quickstart.py
VOCABULARY_STEP = 64  # model.V is rounded up to it: matrix units like multiples

HELP = """\
Turns text into token shards, which `jaxtrain train CONFIG --data.shards=DIR` trains on.

    jaxtrain encode --input=docs --out=runs/docs_gpt2 --tokenizer=gpt2
    jaxtrain encode --input=docs --out=runs/docs_bytes --tokenizer=bytes --val_fraction=0.1
    jaxtrain encode --input=README.md --out=runs/readme --tokenizer=gpt2 --name=readme

INPUT is a file, or a folder with everything below it; a folder may mix formats. The format is
recognised by content:
  UTF-8 text           a file is a document
  JSON lines           a line is a document: the string under --text_field
  JSON array           an element is a document: an object with --text_field, or a string
  CSV, TSV             a row is a document; a .csv or .tsv file with a header, column --text_field
  parquet, Arrow IPC   a row is a document, column --text_field
The first four may be compressed by gzip or zstd. Other files that are no text are skipped and
counted. Links to folders are followed.

Held out for validation are whole text files or the end of one, and lines and rows by a draw that
depends on their file's name and their place: at least one document, about --val_fraction.

Memory stays bounded, about 300 MB a process, whatever the input's size: files are read in pieces
of a megabyte, parquet by its pages. All cores encode; the result is the same for any --workers.

An encoding that is stopped, also by kill -9 or a power cut, goes on with the same command; the
result is the same as if it had not been stopped. Where the input or an option has changed it
starts over, and says so.

A document that cannot be used (a line that is no JSON, a damaged row group, the rest of a
truncated file, a text that the tokenizer refuses) is skipped; the number and the first places
are printed. More than half of the documents or bytes is an error. --on_bad_document=stop makes
the first one an error.

DIR receives NAME_train_000000.bin, NAME_val_000000.bin, ... (256 int32 of header, then uint16
tokens; uint32 where the vocabulary needs it) and meta.json: tokenizer, vocabulary size, eot, and
each shard's tokens, text bytes and fingerprint. Each document starts with the tokenizer's
end-of-text token.
"""


def _parse(argv, prog) -> argparse.Namespace:
    parser = Parser(prog, rewrite_commands(HELP, prog))
    add = parser.add_argument
    add("--input", required=True, help="file or folder of text")
    add("--out", required=True, help="folder for the shards; made if missing")
    add("--tokenizer", required=True, help="bytes, gpt2 or the path of a tokenizer.json")
    add("--name", help="first part of the files' names; default: the input's name")
    add("--text_field", default="text", help="key or column of the text; %(default)s")
    add("--val_fraction", type=float, default=0.01, help="share held out; %(default)s")
    add("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens a shard; %(default)s")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; all %(default)s cores")
    add(
        "--on_bad_document",
        choices=("skip", "stop"),
        default="skip",
        help="what cannot be used is counted, or an error; %(default)s",
    )
    add("--overwrite", action="store_true", help="replace the shards that DIR holds")
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


def _refuse(reason) -> None:
    """Ends the program with the reason in one line."""
    sys.exit(f"error: {reason}")


def _default_name(source: str) -> str:
    """The input's name without suffixes, as shards may be named."""
    path = Path(source).expanduser().resolve()
    name = path.name
    for suffixes in SUFFIXES.values():
        for suffix in suffixes:
            name = name.removesuffix(suffix)
    if not path.is_dir():
        name = Path(name).stem
    # The same in every locale, and a name like "val" is no trap: the split stands behind it.
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._-") or "text"


def _held_shards(out: Path, overwrite: bool) -> list[Path]:
    """Shards of an earlier encoding in `out`; any other there ends the program."""
    held = sorted(out.glob("*.bin"))
    ours = _shards_of(out / "meta.json", "shards")
    # An encoding that was stopped while it moved its shards here lists them in its journal.
    journals = out.glob(f"{STATE}*/{PROGRESS}")
    moved = set().union(*(_shards_of(path, "progress", "meta", "shards") for path in journals))
    others = [path for path in held if path.name not in moved]
    if others and not overwrite:
        found = shown(others[0])
        sys.exit(
            f"error: --out must hold no shards; got {found}. Choose another, or add --overwrite."
        )
    if foreign := [path for path in others if path.name not in ours]:
        found = shown(foreign[0])
        sys.exit(
            f"error: --overwrite replaces what meta.json lists; got {found}. Choose another --out."
        )
    return held


def _shards_of(path: Path, *keys) -> set[str]:
    """Names of the shards that a JSON file lists, or none."""
    try:
        found = json.loads(path.read_text())
        for key in keys:
            found = found[key]
        return {entry["file"] for entry in found}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _check_tokenizer(name: str):
    """The tokenizer; one that cannot be built ends the program, named by this command's flag."""
    try:
        return build_tokenizer(name)
    except ValueError as error:
        message = str(error).replace("--data.tokenizer", "--tokenizer")
        _refuse(message.replace("data.tokenizer", "--tokenizer"))


def _train_command(out: Path, name: str, meta: dict) -> str:
    """The command that trains on the shards, on any machine."""
    arguments = ["quickstart", f"--data.shards={out}"]
    vocabulary = -(-meta["vocab_size"] // VOCABULARY_STEP) * VOCABULARY_STEP
    if vocabulary != 256:
        arguments.append(f"--model.V={vocabulary}")
    tokens = sum(e["tokens"] for e in meta["shards"] if e["split"] == "train")
    if tokens < FEW_TOKENS:  # else there is not one batch
        arguments += ["--data.batch=1", f"--data.seq_len={max(1, min(256, tokens - 1))}"]
    return shell_command("train", *arguments, f"--workdir={_new_folder(Path('runs', name))}")


def _new_folder(path: Path) -> Path:
    """The path, with a number behind it where it is taken: another corpus may have a run there."""
    numbered = (path.with_name(f"{path.name}_{i}") for i in range(2, 1_000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def _print_summary(args, out, name, meta) -> None:
    for split in ("train", "val"):
        shards = [entry for entry in meta["shards"] if entry["split"] == split]
        tokens, text = (sum(s[key] for s in shards) for key in ("tokens", "text_bytes"))
        documents = meta["documents"].get(split, 0)
        print(
            f"{split}: {documents:,} documents, {tokens:,} tokens of {text:,} text bytes in "
            f"{len(shards)} shards"
        )
    print(f"{shown(out)}: tokenizer {args.tokenizer}, {describe_skipped(meta['skipped'])}")
    for problem in meta["problems"]:
        print(f"  skipped {problem}")
    for line in build_tokenizer(args.tokenizer).notes:
        print(f"{args.tokenizer}: {line}")
    if args.val_fraction:
        print(f"train on it:\n  {_train_command(out, name, meta)}")
    else:
        print(
            "nothing is held out, and training needs a held-out shard: encode again with "
            "--val_fraction, or put a shard with 'val' in its name beside these"
        )


@exit_on_file_error()
def main(argv=None, prog="python -m jaxtrain.data.encode") -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # in any locale
    args = _parse(argv, prog)
    out, name = Path(args.out), args.name or _default_name(args.input)
    _check_tokenizer(args.tokenizer)
    try:
        files = list_files(args.input, exclude=out, flag="--input")
        with lock_folder(out) as locked:
            held = _held_shards(out, args.overwrite)
            meta = encode(
                files,
                out,
                args.tokenizer,
                name,
                args.val_fraction,
                args.shard_tokens,
                args.workers,
                args.text_field,
                delay_s=0,
                on_bad_document=args.on_bad_document,
                locked=locked,
                flags=FLAGS,
                note=lambda line: print(line, file=sys.stderr),
            )
            written = {entry["file"] for entry in meta["shards"]}
            for path in held:
                if path.name not in written:
                    path.unlink()
    except ValueError as error:
        _refuse(error)
    except BrokenProcessPool:
        _refuse(
            "an encoding process was killed, most likely for memory. Lower --workers; the same "
            "command goes on."
        )
    except KeyboardInterrupt:
        where = f"The shards in {shown(out)} are as they were."
        print(f"stopped; the same command goes on. {where}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    _print_summary(args, out, name, meta)


if __name__ == "__main__":
    main()

"""Opens the tasks of eval.tasks: reads and encodes their files before the first step."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxtrain.config.run_sections import EvalConfig
from jaxtrain.config.task_list import TaskSource, parse_tasks
from jaxtrain.config.train_config import DataConfig
from jaxtrain.data.corpus import Corpus, open_corpus
from jaxtrain.data.shard_files import split_of
from jaxtrain.data.tasks.examples import detect_kind, read_examples
from jaxtrain.data.tasks.tokens import (
    GPT2_ENTRIES,
    GPT2_START,
    LLMC_MAGIC,
    TokenExample,
    add_bytes,
    encode_example,
    read_llmc,
)
from jaxtrain.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_identity
from jaxtrain.file_errors import add_path_to_errors


@dataclass(frozen=True)
class Task:
    """A task of eval.tasks: examples to score, or a held-out text."""

    name: str
    kind: str
    total: int  # examples in the file
    examples: tuple[TokenExample, ...] = ()  # those that are scored
    corpus: Corpus | None = None  # of kind heldout
    fingerprint: str = ""

    def describe(self, context_length: int) -> str:
        """Returns a line for the start of a run.

        Args:
            context_length: tokens that the model reads at most.
        """
        if self.corpus is not None:
            return f"{self.corpus.describe()}, held out"
        longest = [len(e.context) + max(map(len, e.choices)) for e in self.examples]
        cut = sum(tokens > context_length + 1 for tokens in longest)
        some = "" if len(self.examples) == self.total else f" of {self.total:,}"
        note = f", {cut:,} of them cut to {context_length} tokens" if cut else ""
        return f"{self.name}: {len(self.examples):,}{some} examples of kind {self.kind}{note}"


def open_tasks(
    cfg: EvalConfig, data: DataConfig, tokenizer_name: str | None, V: int, workdir: Path | str
) -> list[Task]:
    """Returns the tasks of eval.tasks, read and encoded.

    Args:
        data: the run's; its sequence length and batch are those of held-out texts.
        tokenizer_name: the run's; None if it is unknown.
        V: the model's vocabulary.
        workdir: folder of the run, below which held-out texts are encoded.

    Raises:
        ValueError: a file is missing or malformed, or needs another tokenizer.
    """
    sources = parse_tasks(cfg.tasks)
    tokenizer = build_tokenizer(tokenizer_name) if sources and tokenizer_name else None
    tasks = []
    for source in sources:
        with add_path_to_errors(source.path):
            kind = source.kind or _detect(source)
            if kind == "heldout":
                tasks.append(_open_held_out(source, data, tokenizer, V, Path(workdir)))
            else:
                tasks.append(_open_examples(source._replace(kind=kind), cfg, tokenizer, V))
    return tasks


def fingerprint_tasks(tasks: Sequence[Task]) -> str:
    """Returns ` NAME=HASH` of each task, which must be equal on all processes of a run."""
    return "".join(f" {task.name}={task.fingerprint}" for task in tasks)


def _detect(source: TaskSource) -> str:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return "heldout"
    if not path.is_file():
        raise ValueError(
            f"eval.tasks must name files and folders; got {source.name}={source.path}, which does "
            "not exist. Set --eval.tasks."
        )
    with open(path, "rb") as file:
        start = file.read(64)
    if start[:4] == LLMC_MAGIC.to_bytes(4, "little"):
        return "llmc"
    if not start.lstrip().startswith(b"{"):
        return "heldout"
    kind = detect_kind(path)
    if not kind:
        raise ValueError(
            f"{path} must have the fields of HellaSwag, ARC, LAMBADA or other multiple choice in "
            "its first line; got none of endings, answerKey, choices and text. Set --eval.tasks."
        )
    return kind


def _open_held_out(
    source: TaskSource, data: DataConfig, tokenizer: Tokenizer | None, V: int, workdir: Path
) -> Task:
    path = Path(source.path).expanduser()
    if path.suffix == ".bin" or path.is_dir() and any(path.rglob("*.bin")):
        data = replace(data, shards=str(path), text="")
        split = "val" if path.is_dir() else split_of(path.name)
    elif tokenizer is None:
        raise _unknown_tokenizer(source)
    else:  # without a fraction to hold out, all of the text is in one split
        data = replace(data, text=str(path), shards="", val_fraction=0.0, tokenizer=tokenizer.name)
        split = "train"
    try:
        corpus = open_corpus(data, split, V, workdir)
    except ValueError as error:
        message = re.sub(r"data\.(shards|text)\b", "eval.tasks", str(error))
        raise ValueError(f"{source.name}={source.path}: {message}") from error
    if tokenizer and corpus.tokenizer_name:
        wanted, found = map(tokenizer_identity, (tokenizer.name, corpus.tokenizer_name))
        if wanted != found:
            raise ValueError(
                f"eval.tasks must have the run's tokenizer, {tokenizer.name}; got {source.name}="
                f"{source.path}, encoded by {corpus.tokenizer_name}. Set --eval.tasks."
            )
    if tokenizer and corpus.tokenizer_name is None:
        corpus = replace(corpus, tokenizer_name=tokenizer.name)
    corpus = replace(corpus, split=source.name)
    return Task(source.name, "heldout", 0, corpus=corpus, fingerprint=corpus.fingerprint)


def _open_examples(
    source: TaskSource, cfg: EvalConfig, tokenizer: Tokenizer | None, V: int
) -> Task:
    path = Path(source.path).expanduser()
    if source.kind == "llmc":
        if tokenizer and tokenizer.vocab_size != GPT2_ENTRIES:
            raise ValueError(
                f"{path} has tokens of GPT-2, so the run's tokenizer must be gpt2; got "
                f"{tokenizer.name}. Set --eval.tasks."
            )
        found = read_llmc(path)
        examples = [found[i] for i in _spread(len(found), cfg.examples)]
        if tokenizer:
            examples = [add_bytes(example, tokenizer.token_bytes) for example in examples]
        if cfg.start_token:
            start = np.int32(GPT2_START)
            examples = [e._replace(context=np.append(start, e.context)) for e in examples]
    else:
        if tokenizer is None:
            raise _unknown_tokenizer(source)
        found = read_examples(source.kind, path)
        chosen = [found[i] for i in _spread(len(found), cfg.examples)]
        examples = [encode_example(example, tokenizer, cfg.start_token) for example in chosen]
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.context, *example.choices):
            if ids.max() >= V:
                raise ValueError(
                    f"tokens of {path} must be below model.V={V}; got {ids.max()}. Set "
                    "--eval.tasks."
                )
            digest.update(f"{len(ids)} ".encode() + ids.astype("<i4").tobytes())
        digest.update(f"{example.answer}\n".encode())
    task = Task(source.name, source.kind, len(found), tuple(examples))
    return replace(task, fingerprint=digest.hexdigest()[:32])


def _unknown_tokenizer(source: TaskSource) -> ValueError:
    return ValueError(
        f"the text of {source.name}={source.path} needs the run's tokenizer, but the shards do not "
        "name theirs. Set --data.tokenizer, or encode the text with jaxtrain encode."
    )


def _spread(total: int, wanted: int) -> np.ndarray:
    """Returns the indices of `wanted` of `total` examples, evenly spread; all if wanted is 0."""
    if not 0 < wanted < total:
        return np.arange(total)
    return np.arange(wanted) * total // wanted

"""Reads the value of eval.tasks: names, kinds and paths of evaluation tasks."""

import re
import shlex
from typing import NamedTuple

KINDS = {
    "hellaswag": "JSON lines of HellaSwag: ctx, endings, label",
    "arc": "JSON lines of ARC, by AI2 or Hugging Face: question, choices, answerKey",
    "choices": "JSON lines of other multiple choice: context, choices, label",
    "last_word": "JSON lines of LAMBADA and the like: text, whose last word is to be predicted",
    "llmc": "llm.c's binary file of multiple choice, such as hellaswag_val.bin",
    "heldout": "a folder of token shards, or text in any format that data.text reads",
}


class TaskSource(NamedTuple):
    """A task as eval.tasks names it; kind is "" if the file decides."""

    name: str
    kind: str
    path: str


def parse_tasks(value: str) -> list[TaskSource]:
    """Returns the tasks in a value of eval.tasks: `NAME=PATH NAME=KIND:PATH`.

    A path with spaces is quoted as in a shell.

    Raises:
        ValueError: an entry has another form, or a name occurs twice; the message is a rule, "must
            ...".
    """
    try:
        entries = shlex.split(value)
    except ValueError as error:
        raise ValueError(f"must have balanced quotes: {error}") from None
    sources = []
    for entry in entries:
        match = re.fullmatch(r"([A-Za-z0-9_]+)=(?:(\w+):)?(.+)", entry, re.S)
        if not match:
            raise ValueError(
                f"must be NAME=PATH or NAME=KIND:PATH, separated by spaces, not {entry!r}"
            )
        name, kind, path = match[1], match[2] or "", match[3]
        if kind and kind not in KINDS:
            raise ValueError(f"must have a kind among {', '.join(KINDS)}, not {kind!r}")
        sources.append(TaskSource(name, kind, path))
    names = [source.name for source in sources]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"must name each task once, not {', '.join(repeated)} several times")
    return sources

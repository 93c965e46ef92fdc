"""Reads the examples of tasks in JSON lines: a context, its possible continuations, the answer.

The texts are put together as lm_eval does for the tasks of the same names, so that accuracies can
be compared with published ones. Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SHOWN_CHARS = 60  # of a wrong value in an error


class Example(NamedTuple):
    """One example as text.

    Attributes:
        context: what the continuations follow; it is not scored.
        choices: the possible continuations, each with the space before it. One: the next word,
            which greedy decoding must predict.
        answer: index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


class FieldError(ValueError):
    """A field of a line has no usable value."""

    def __init__(self, name: str, rule: str, value: Any):
        shown = json.dumps(value, ensure_ascii=False)
        if len(shown) > SHOWN_CHARS:
            shown = f"{shown[:SHOWN_CHARS]}..."
        super().__init__(f"field {name!r} must be {rule}; got {shown}")


def read_examples(kind: str, path: Path) -> list[Example]:
    """Returns the examples of a file of JSON lines.

    Raises:
        ValueError: a line is not valid; the error names the file, the line and the field.
    """
    parse, examples = PARSERS[kind], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("the line must be a JSON object")
            examples.append(parse(record))
        except UnicodeDecodeError:
            raise _line_error(kind, path, number, "the line must be UTF-8") from None
        except json.JSONDecodeError as error:
            reason = f"the line must be a JSON object: {error.msg} at character {error.pos}"
            raise _line_error(kind, path, number, reason) from None
        except ValueError as error:
            raise _line_error(kind, path, number, str(error)) from None
    if not examples:
        raise ValueError(f"{path} must contain an example; got none. Set --eval.tasks.")
    return examples


def _line_error(kind: str, path: Path, number: int, reason: str) -> ValueError:
    return ValueError(f"{path}, line {number}, as {kind}: {reason}. Set --eval.tasks.")


def detect_kind(path: Path) -> str:
    """Returns the kind of a file of JSON lines from its first line; "" if no kind has its fields.

    Raises:
        ValueError: the first line is not a JSON object.
    """
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        record = json.loads(first)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} must be text, or have a JSON object in each line; its first line is neither. "
            "Name its kind in --eval.tasks, as NAME=KIND:PATH."
        )
    fields = {"endings": "hellaswag", "answerKey": "arc", "choices": "choices", "text": "last_word"}
    return next((kind for field, kind in fields.items() if field in record), "")


def _text(record: dict, name: str, default: str | None = None) -> str:
    value = record.get(name, default)
    if not isinstance(value, str):
        raise FieldError(name, "a string", value)
    return value


def _texts(record: dict, name: str, value: Any) -> list[str]:
    if not (isinstance(value, list) and len(value) > 1 and all(type(x) is str for x in value)):
        raise FieldError(name, "a list of at least 2 strings", value)
    if not all(value):
        raise FieldError(name, "a list of strings that are not empty", value)
    return value


def _index(record: dict, name: str, count: int) -> int:
    """Returns the index of the right choice; Hugging Face's HellaSwag has it as a string."""
    value = record.get(name)
    number = int(value) if isinstance(value, str) and re.fullmatch(r"\d+", value) else value
    if type(number) is not int or not 0 <= number < count:
        raise FieldError(name, f"an integer from 0 to {count - 1}", value)
    return number


def _clean_hellaswag(text: str) -> str:
    """Removes the marks of WikiHow articles, as lm_eval does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _parse_hellaswag(record: dict) -> Example:
    if "ctx_a" in record:
        context = f"{_text(record, 'ctx_a')} {_text(record, 'ctx_b', '').capitalize()}"
    else:
        context = _text(record, "ctx")
    if "activity_label" in record:
        context = f"{_text(record, 'activity_label')}: {context}"
    endings = _texts(record, "endings", record.get("endings"))
    choices = tuple(f" {_clean_hellaswag(ending)}" for ending in endings)
    return Example(_clean_hellaswag(context), choices, _index(record, "label", len(choices)))


def _parse_arc(record: dict) -> Example:
    question, choices = record.get("question"), record.get("choices")
    if isinstance(question, dict):  # as AI2 publishes it
        choices, name = question.get("choices"), "question.choices"
        stem = _text({"question.stem": question.get("stem")}, "question.stem")
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise FieldError(name, "a list of objects with text and label", choices)
        texts, labels = [c.get("text") for c in choices], [c.get("label") for c in choices]
    else:  # as Hugging Face does
        name, stem = "choices", _text(record, "question")
        if not isinstance(choices, dict):
            raise FieldError(name, "an object with the lists text and label", choices)
        texts, labels = choices.get("text"), choices.get("label")
    texts, labels = _texts(record, f"{name}.text", texts), _texts(record, f"{name}.label", labels)
    if len(texts) != len(labels):
        raise FieldError(f"{name}.label", f"a list of {len(texts)} labels", labels)
    answer = record.get("answerKey")
    if answer not in labels:
        raise FieldError("answerKey", f"one of {', '.join(labels)}", answer)
    context = f"Question: {stem}\nAnswer:"
    return Example(context, tuple(f" {text}" for text in texts), labels.index(answer))


def _parse_choices(record: dict) -> Example:
    choices = _texts(record, "choices", record.get("choices"))
    answer = _index(record, "label", len(choices))
    return Example(_text(record, "context"), tuple(f" {text}" for text in choices), answer)


def _parse_last_word(record: dict) -> Example:
    text = _text(record, "text").rstrip()
    context, space, word = text.rpartition(" ")
    if not (context and word):
        raise FieldError("text", "at least two words with a space between them", text)
    return Example(context, (space + word,), 0)


PARSERS: dict[str, Callable[[dict], Example]] = {
    "hellaswag": _parse_hellaswag,
    "arc": _parse_arc,
    "choices": _parse_choices,
    "last_word": _parse_last_word,
}

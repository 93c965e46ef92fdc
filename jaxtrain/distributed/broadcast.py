"""Shares values and errors between processes, so that all of them continue or stop together."""

import collections
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.errors import CheckpointError
from jaxtrain.file_errors import describe_error

MESSAGE_BYTES = 1024  # a gathered text is truncated to this length; a broadcast one is padded
Value = TypeVar("Value")


def broadcast_from_process_0(function: Callable[[], Value]) -> Value:
    """Calls function() on process 0 only and returns its JSON-able value on every process.

    If the call fails, every process raises, so that none is left waiting in a collective.

    Raises:
        CheckpointError: function raised it, or an OSError, on process 0.
        ValueError: function raised it on process 0.
        Exception: function raised any other error. Process 0 raises it, the other processes raise
            a CheckpointError with its text.
    """
    answer, raised = {}, None
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except Exception as error:
            raised = error
            answer = {"error": describe_error(error), "bad_input": isinstance(error, ValueError)}
    if jax.process_count() > 1:
        # The others must know the size of the array before they can take part in its broadcast.
        text = np.frombuffer(pad_text(json.dumps(answer).encode()), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
        text = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
        answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
    if "error" not in answer:
        return answer["value"]
    if raised and not isinstance(raised, OSError):
        raise raised
    raise (ValueError if answer["bad_input"] else CheckpointError)(answer["error"]) from raised


def pad_text(text: bytes) -> bytes:
    """Returns JSON with spaces after it: MESSAGE_BYTES long, or that times a power of two.

    JAX compiles a program for each size of a broadcast array and never frees it. That takes 1.5 MB
    of each process: measured with jax 0.10.2 on CPU, 160 broadcasts of different sizes.
    """
    size = MESSAGE_BYTES
    while size < len(text):
        size *= 2
    return text.ljust(size)


def run_on_all_processes(function: Callable[[], Value]) -> Value:
    """Calls function() on every process, and raises on every process if one call failed.

    Returns:
        This process's own value.

    Raises:
        ValueError: function raised one, or an OSError, on some process; the text is that of the
            first such process.
        Exception: function raised any other error. Its process raises that, the other processes
            raise a ValueError with its text.
    """
    value: Any = None
    raised = None
    try:
        value = function()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        raised = error
    first_error = gather_first_error((describe_error(raised) or repr(raised)) if raised else "")
    if raised and not isinstance(raised, ValueError | OSError):
        raise raised
    if first_error:
        raise ValueError(first_error) from raised
    return value


def gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes, each cut to MESSAGE_BYTES, in order of process."""
    if jax.process_count() == 1:
        return [text]
    padded = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    texts = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(texts)]


def gather_first_error(error: str) -> str:
    """Returns the first non-empty text among those of all processes; "" if all are empty.

    With several processes, the text is prefixed by the process that it comes from.
    """
    texts = gather_texts(error)
    if len(texts) == 1:
        return error
    return next((f"process {i}: {text}" for i, text in enumerate(texts) if text), "")


def check_same_on_all_processes(name: str, text: str) -> None:
    """Raises ValueError unless all processes pass the same text, such as a hash."""
    if difference := describe_difference(name, gather_texts(text)):
        raise ValueError(difference)


def describe_difference(name: str, texts: Sequence[str]) -> str:
    """Returns which processes have another text than most; "" if all have the same.

    Args:
        texts: the text of each process.
    """
    [(usual, _), *others] = collections.Counter(texts).most_common()
    if not others:
        return ""
    odd = [f"process {i}: {text}" for i, text in enumerate(texts) if text != usual]
    return (
        f"{name} must be the same on every process; got {', '.join(odd)}; most have {usual}. "
        "Start all of them with the same flags, code, packages and data."
    )


def agree(value: bool) -> bool:
    """Returns whether `value` is true on all processes. All of them must call it."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.int32(value))))

"""Facts that all processes share: process 0's value, or the error of whichever process has one."""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.errors import CheckpointError
from jaxtrain.file_errors import describe_error

MESSAGE_BYTES = 1024  # of a reason that one process tells the others


def broadcast_from_process_0(function):
    """Returns function()'s JSON-able value on process 0, in every process.

    Raises:
        CheckpointError: function raised it, or an OSError, on process 0; in every process, with its
            text.
        ValueError: likewise.
        Exception: any other, on process 0; a CheckpointError with its text in the others.
    """
    answer, raised = {}, None
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except Exception as error:
            raised = error
            answer = {"error": describe_error(error), "bad_input": isinstance(error, ValueError)}
    if jax.process_count() > 1:
        text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
        text = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
        answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
    if "error" not in answer:
        return answer["value"]
    if raised and not isinstance(raised, OSError):
        raise raised
    raise (ValueError if answer["bad_input"] else CheckpointError)(answer["error"]) from raised


def run_on_all_processes(function):
    """Returns function() of this process; raises in every process if it raised in one.

    Raises:
        ValueError: function raised one, or an OSError, in some process; with the first one's text.
        Exception: any other, where it was raised; a ValueError with its text in the others.
    """
    value, raised = None, None
    try:
        value = function()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        raised = error
    reason = gather_first_error((describe_error(raised) or repr(raised)) if raised else "")
    if raised and not isinstance(raised, ValueError | OSError):
        raise raised
    if reason:
        raise ValueError(reason) from raised
    return value


def gather_texts(text: str) -> list[str]:
    """Returns each process's text, cut to REASON_BYTES, in every process."""
    if jax.process_count() == 1:
        return [text]
    said = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    texts = multihost_utils.process_allgather(np.frombuffer(said, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(texts)]


def gather_first_error(reason: str) -> str:
    """Returns the first process's reason that is not empty, in every process."""
    texts = gather_texts(reason)
    if len(texts) == 1:
        return reason
    return next((f"process {i}: {text}" for i, text in enumerate(texts) if text), "")

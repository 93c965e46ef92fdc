"""Small facts that all processes must share: said by process 0, or by whoever has a complaint."""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.digest import CheckpointError

REASON_BYTES = 512  # of a reason that one process tells the others


def from_process_0(function):
    """function()'s JSON-able value on process 0, in every process.

    Raises:
        CheckpointError: function raised on process 0; in every process, with its text.
    """
    answer = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except (CheckpointError, OSError) as error:
            answer = {"error": str(error)}
    if jax.process_count() > 1:
        text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
        text = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
        answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return answer["value"]


def of_all(text: str) -> list[str]:
    """What each process says, cut to REASON_BYTES, in every process."""
    if jax.process_count() == 1:
        return [text]
    said = text.encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
    texts = multihost_utils.process_allgather(np.frombuffer(said, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(texts)]


def first_reason(reason: str) -> str:
    """The first process's reason that is not empty, in every process."""
    texts = of_all(reason)
    if len(texts) == 1:
        return reason
    return next((f"process {i}: {text}" for i, text in enumerate(texts) if text), "")

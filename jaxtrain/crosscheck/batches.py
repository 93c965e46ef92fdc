"""Describes the batches of a trace and names how two batches differ.

A target may be ignored (-100 in PyTorch, weight 0 here), and the mean over targets may weigh them
unequally: a loop that averages the means of micro-batches does, if these have unequal numbers of
targets. Training on all rows at once with these weights computes the same loss and gradient as
accumulating over the micro-batches.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import logsumexp

from jaxtrain.crosscheck.trace import IGNORED, Batch, StepRecord, batch_hash, digest
from jaxtrain.training.batch_arrays import target_weights

WEIGHT_TOLERANCE = 1e-6  # relative: one side may store weights in float32
PARTS = {
    "tokens": "the tokens differ: check the shards, the seed and the order of the data",
    "inputs": "the inputs differ: check the shards, the seed and the order of the data",
    "mask": "the mask differs: the loss does not count the same targets (in PyTorch, those of -100 "
    "or weight 0 are ignored)",
    "targets": "the inputs are equal and the targets differ: a target must be the next input",
    "weights": "the weights of the targets in the mean differ: the mean over all tokens is not the "
    "mean of the micro-batches' means",
}


def describe_batch(batch: Batch, rows: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Returns the fields "batch" and "parts" of a step, as recorder.py documents them.

    Args:
        rows: of each micro-batch.
        seed: of the digest of the weights.
    """
    tokens_BT1 = np.asarray(batch["tokens"])
    weights_BT = np.asarray(target_weights(batch), np.float64)
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    mask_BT = weights_BT > 0
    kept = weights_BT[mask_BT]
    is_equal = not kept.size or kept.min() == kept.max()
    parts = {
        "inputs": batch_hash(inputs_BT),
        "targets": batch_hash(np.where(mask_BT, targets_BT, IGNORED)),
        "mask": batch_hash(mask_BT, dtype="u1"),
        "weights": None if is_equal else digest(weights_BT / kept.mean(), seed),
        "micro_batches": [int(count) for count in rows],
        "targets_each": [int(part.sum()) for part in _split_rows(mask_BT, rows)],
    }
    return {"batch": batch_hash(inputs_BT, targets_BT), "parts": parts}


def micro_batch_losses(logits_BTV: Any, batch: Batch, rows: Sequence[int]) -> list[float]:
    """Returns each micro-batch's share of the loss in nats; they add up to the step's loss."""
    logits_BTV = np.asarray(logits_BTV, np.float64)
    targets_BT1 = np.asarray(batch["tokens"])[:, 1:, None]
    weights_BT = np.asarray(target_weights(batch), np.float64)
    chosen_BT = np.take_along_axis(logits_BTV, targets_BT1, -1)[..., 0]
    nats_BT = weights_BT * (logsumexp(logits_BTV, -1) - chosen_BT) / max(weights_BT.sum(), 1)
    return [float(part.sum()) for part in _split_rows(nats_BT, rows)]


def _split_rows(x: np.ndarray, rows: Sequence[int]) -> list[np.ndarray]:
    return np.split(x, np.cumsum(rows)[:-1])


def differing_parts(x: StepRecord, y: StepRecord) -> list[str]:
    """Returns the PARTS in which the batches of two steps differ.

    Returns ["tokens"] if they differ and one trace, of format 1, has no parts.
    """
    if "parts" not in x or "parts" not in y:
        return ["tokens"] if x["batch"] != y["batch"] else []
    a, b = x["parts"], y["parts"]
    found = [part for part in ("inputs", "mask", "targets") if a[part] != b[part]]
    if len(found) > 1 and found[-1] == "targets":
        found.pop()  # other inputs have other targets, and the hash of targets covers the mask
    if not found and not _are_close(a["weights"], b["weights"]):
        found.append("weights")
    return found


def _are_close(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.abs(np.subtract(a, b)).max() <= WEIGHT_TOLERANCE * max(a[0], b[0]))


def describe_difference(x: StepRecord, y: StepRecord, names: tuple[str, str]) -> list[str]:
    """Returns sentences that say how the batches of two steps differ."""
    found = differing_parts(x, y)
    lines = [PARTS[part] for part in found]
    for key, noun in (("micro_batches", "rows"), ("targets_each", "targets")):
        a, b = (record.get("parts", {}).get(key) for record in (x, y))
        if found and a != b and a and b:
            lines.append(f"{names[0]} has {_listed(a)} {noun}, {names[1]} {_listed(b)}")
    return lines


def _listed(counts: list[int]) -> str:
    """Returns "24", or "8 + 8 + 4" for several micro-batches."""
    return " + ".join(map(str, counts))

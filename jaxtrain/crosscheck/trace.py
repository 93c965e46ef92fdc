"""Reads and writes step traces without PyTorch; `recorder.py` documents their format."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.files import strict_json

FORMAT = 2
READABLE = (1, 2)  # format 1 has no "parts", "targets" or "weights"
PROJECTIONS = 16
DIGEST = 3 + PROJECTIONS  # norm, mean, largest size, projections
CHUNK = 1 << 18  # entries digested at once
QUANTITIES = ("activations", "gradient", "update", "parameter")
IGNORED = -100  # a target that the loss ignores, as in torch's cross_entropy
PRECISIONS = ("float64", "float32", "bfloat16")

Batch = dict[str, Any]  # {"tokens"} [B,T+1]; see batches_of
StepRecord = dict[str, Any]  # one line of a trace


class TraceError(ValueError):
    """A trace cannot be read or compared."""


class Trace(NamedTuple):
    header: dict
    steps: list[dict]  # one record per step; step 0, if present, has the initial parameters

    @property
    def name(self) -> str:
        return self.header["side"]

    @property
    def precision(self) -> str:
        """One of PRECISIONS; float32 for a float64 run of a model that computes in float32."""
        narrow = any(r.get("float32") and not r.get("float32_skipped") for r in self.steps)
        return "float32" if narrow else self.header["precision"]


def _mix(h):
    """Hashes uint32 [N] by lowbias32. Source: https://nullprogram.com/blog/2018/07/31/"""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


@functools.lru_cache(maxsize=2)  # most tensors need only the first
def _signs(start, seed):
    """Returns pseudo-random signs, +1 and -1, from entry `start`: float64 [PROJECTIONS,CHUNK]."""
    salt = _mix(np.array([seed & 0xFFFFFFFF], np.uint32))
    hashed = _mix(np.arange(start, start + CHUNK).astype(np.uint32) ^ salt)
    bits = hashed >> np.arange(PROJECTIONS, dtype=np.uint32)[:, None] & np.uint32(1)
    return 2.0 * bits - 1.0


def digest(x: Any, seed: int = 0) -> list[float]:
    """Returns [norm, mean, largest size, p0 ... p15] of an array, computed in float64."""
    flat = np.asarray(x).reshape(-1)
    square = total = largest = 0.0
    projections = np.zeros(PROJECTIONS)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(np.float64)
        projections += _signs(start, seed)[:, : part.size] @ part
        square += float(part @ part)
        total += float(part.sum())
        largest = max(largest, float(np.abs(part).max()))
    return [square**0.5, total / max(flat.size, 1), largest, *projections.tolist()]


def digest_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Estimates the relative L2 distance of two tensors from their digests.

    The projections estimate it; the norms and the largest entries bound it from below.
    """
    largest = max(a[0], b[0])
    if not largest > 0:
        return 0.0 if largest == 0 else np.nan
    projected = np.sqrt(np.mean(np.square(a[3:] - b[3:])))
    return float(max(projected, abs(a[0] - b[0]), abs(a[2] - b[2])) / largest)


def batch_hash(*arrays: Any, dtype: str = "<i4") -> str:
    """Returns 16 hex digits that identify arrays, such as a batch's inputs and targets [B,T]."""
    sha = hashlib.sha256()
    for x in arrays:
        sha.update(np.ascontiguousarray(x, dtype).tobytes())
    return sha.hexdigest()[:16]


class TraceWriter:
    """Writes a trace and flushes after each line, so that a killed run loses no finished step.

    Args:
        more: further fields of the header.
    """

    def __init__(
        self, path: str | Path, side: str, precision: str, seed: int = 0, more: dict | None = None
    ):
        self.seed = seed
        self._file = open(path, "w", encoding="utf-8")
        header = {"trace": FORMAT, "side": side, "precision": precision, "seed": seed}
        self.write(header | (more or {}))

    def write(self, line: dict) -> None:
        self._file.write(strict_json(line) + "\n")
        self._file.flush()

    def digests(self, named: Iterable[tuple[str, Any]]) -> dict[str, list[float]]:
        return {name: digest(x, self.seed) for name, x in named}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def read_trace(path: str | Path) -> Trace:
    """Reads a trace; skips an incomplete last line, which a killed run leaves.

    Raises:
        TraceError: the file is not a trace, or one of its lines does not follow the format.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"a trace must be a readable text file; got {path}: {error}.") from None
    lines = text[: text.rfind("\n") + 1].splitlines()  # without an incomplete last line
    parsed = [_parse_line(path, number, line) for number, line in enumerate(lines, 1)]
    if not parsed or parsed[0].get("trace") not in READABLE:
        found = parsed[0].get("trace") if parsed else "an empty file"
        raise TraceError(f"a trace must begin with format 1 or {FORMAT}; got {found} in {path}.")
    header, *steps = parsed
    if header.get("precision") not in PRECISIONS or not isinstance(header.get("seed"), int):
        raise TraceError(f"a trace's header must name precision and seed; got {header} in {path}.")
    for number, record in enumerate(steps, 2):
        _check_record(path, number, record)
    numbers = [record["step"] for record in steps]
    if numbers != sorted(set(numbers)):
        raise TraceError(f"a trace's steps must ascend; got {numbers[:20]} in {path}.")
    if not any(numbers):
        raise TraceError(f"a trace must have at least one step; got none in {path}.")
    return Trace({"side": Path(path).stem} | header, steps)


def _parse_line(path, number: int, line: str) -> dict:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise TraceError(f"line {number} of {path} must be a JSON object; got {line[:60]!r}.")
    return value


def _check_record(path, number: int, record: dict) -> None:
    """Checks a step's record and converts its digests to arrays, in place."""
    if not isinstance(record.get("step"), int):
        raise TraceError(f"line {number} of {path} must name its step; got {sorted(record)}.")
    if record["step"] and not {"batch", "loss"} <= record.keys():
        raise TraceError(f"line {number} of {path} must have batch and loss; got {sorted(record)}.")
    for quantity in QUANTITIES:
        for name, values in record.get(quantity, {}).items():
            if len(values) != DIGEST:
                raise TraceError(
                    f"line {number} of {path}: {quantity} of {name} must have {DIGEST} numbers; "
                    f"got {len(values)}."
                )
            record[quantity][name] = np.array(values, np.float64)  # converts "nan" and "inf" too
    for name in ("loss", "grad_norm"):
        if name in record:
            record[name] = float(record[name])
    if record.get("parts", {}).get("weights") is not None:
        record["parts"]["weights"] = np.array(record["parts"]["weights"], np.float64)


def batches_of(trace: Trace) -> Iterator[Batch]:
    """Yields a trace's batches.

    "tokens" and, for packed rows, "docs" are int32 [B,T+1]. "weights", float64 [B,T], has each
    target's weight in the mean if some are ignored or they differ. "rows", int [n], has the rows of
    each micro-batch if there are several.

    Raises:
        TraceError: a step has no batch.
    """
    for record in trace.steps:
        if not record["step"]:
            continue
        if "tokens" not in record:
            raise TraceError(
                f"training on a trace needs its batches; step {record['step']} of {trace.name} has "
                "none. Record it with keep_batches."
            )
        names = [name for name in ("tokens", "docs") if name in record]
        batch: Batch = {name: np.array(record[name], np.int32) for name in names}
        if "weights" in record:
            batch["weights"] = np.array(record["weights"], np.float64)
        elif "targets" in record:
            weights_BT = (np.array(record["targets"]) != IGNORED).astype(np.float64)
            if not weights_BT.all():
                batch["weights"] = weights_BT
        rows = record.get("parts", {}).get("micro_batches", [])
        if len(rows) > 1:
            batch["rows"] = np.array(rows)
        yield batch

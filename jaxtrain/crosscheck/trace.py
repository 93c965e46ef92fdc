"""Reads and writes step traces without PyTorch; `recorder.py` documents their format."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.files import strict_json

FORMAT = 1
PROJECTIONS = 16
DIGEST = 3 + PROJECTIONS  # norm, mean, largest size, projections
CHUNK = 1 << 18  # entries digested at once
QUANTITIES = ("activations", "gradient", "update", "parameter")
PRECISIONS = ("float64", "float32", "bfloat16")


class TraceError(ValueError):
    """A trace cannot be read or compared."""


class Trace(NamedTuple):
    header: dict
    steps: list[dict]  # one record per step; step 0, if present, has the initial parameters

    @property
    def name(self) -> str:
        return self.header["side"]


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


def batch_hash(tokens_BT1: Any) -> str:
    """Returns 16 hex digits that identify a batch, from its inputs and then its targets."""
    tokens = np.asarray(tokens_BT1, "<i4")
    sha = hashlib.sha256(tokens[:, :-1].tobytes())
    sha.update(tokens[:, 1:].tobytes())
    return sha.hexdigest()[:16]


class TraceWriter:
    """Writes a trace and flushes after each line, so that a killed run loses no finished step."""

    def __init__(self, path: str | Path, side: str, precision: str, seed: int = 0):
        self.seed = seed
        self._file = open(path, "w", encoding="utf-8")
        self.write({"trace": FORMAT, "side": side, "precision": precision, "seed": seed})

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
    if not parsed or parsed[0].get("trace") != FORMAT:
        found = parsed[0].get("trace") if parsed else "an empty file"
        raise TraceError(f"a trace must begin with format {FORMAT}; got {found} in {path}.")
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


def batches_of(trace: Trace) -> Iterator[dict[str, np.ndarray]]:
    """Yields a trace's batches: {"tokens"}, int32 [B,T+1], and what else the trace has of them.

    That is for packed rows {"docs"}, int32 [B,T+1], and {"weights"} of the targets, float32 [B,T].

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
        forms = {"tokens": np.int32, "docs": np.int32, "weights": np.float32}
        yield {name: np.array(record[name], form) for name, form in forms.items() if name in record}

"""Step traces, read and written without PyTorch; `recorder.py` says what stands in them."""

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtrain.files import strict_json

FORMAT = 1
PROJECTIONS = 16
DIGEST = 3 + PROJECTIONS  # norm, mean, largest size, projections
CHUNK = 1 << 18  # entries digested at once
QUANTITIES = ("activations", "gradient", "update", "parameter")
PRECISIONS = ("float64", "float32", "bfloat16")


class TraceError(ValueError):
    """A trace cannot be used: what was expected of it, and what was found."""


class Trace(NamedTuple):
    header: dict
    steps: list[dict]  # step 0 first, if it is there

    @property
    def name(self) -> str:
        return self.header["side"]


def _mix(h):
    """lowbias32, https://nullprogram.com/blog/2018/07/31/; uint32 [N] -> uint32 [N]"""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


@functools.lru_cache(maxsize=1)
def _first_signs(seed):
    return _signs(0, CHUNK, seed)


def _signs(start, stop, seed):
    """+1 and -1 as float64 [PROJECTIONS, stop - start]."""
    salt = _mix(np.array([seed & 0xFFFFFFFF], np.uint32))
    hashed = _mix(np.arange(start, stop).astype(np.uint32) ^ salt)
    bits = hashed >> np.arange(PROJECTIONS, dtype=np.uint32)[:, None] & np.uint32(1)
    return 2.0 * bits - 1.0


def digest(x, seed: int = 0) -> list[float]:
    """[norm, mean, largest size, p0 ... p15] of an array, in float64."""
    flat = np.asarray(x).reshape(-1)
    square = total = largest = 0.0
    projections = np.zeros(PROJECTIONS)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(np.float64)
        signs = _signs(start, start + part.size, seed) if start else _first_signs(seed)
        projections += signs[:, : part.size] @ part
        square += float(part @ part)
        total += float(part.sum())
        largest = max(largest, float(np.abs(part).max()))
    return [square**0.5, total / max(flat.size, 1), largest, *projections.tolist()]


def batch_hash(tokens_BT1) -> str:
    """16 hex digits of a batch: its inputs, then its targets."""
    tokens = np.asarray(tokens_BT1, "<i4")
    sha = hashlib.sha256(tokens[:, :-1].tobytes())
    sha.update(tokens[:, 1:].tobytes())
    return sha.hexdigest()[:16]


class Writer:
    """Writes a trace line by line: a run that is cut keeps its whole steps."""

    def __init__(self, path, side: str, precision: str, seed: int = 0):
        self.seed = seed
        self._file = open(path, "w", encoding="utf-8")
        self.write({"trace": FORMAT, "side": side, "precision": precision, "seed": seed})

    def write(self, line: dict) -> None:
        self._file.write(strict_json(line) + "\n")
        self._file.flush()

    def digests(self, named) -> dict:
        return {name: digest(x, self.seed) for name, x in named}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def read_trace(path) -> Trace:
    """The whole steps of a trace; the last line of a loop that was killed is left out.

    Raises:
        TraceError: the file is no trace, or a line of it is not as the format says.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"a trace must be a readable text file; got {path}: {error}.") from None
    lines = text[: text.rfind("\n") + 1].splitlines()  # a line without an end was cut
    parsed = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    if not parsed or parsed[0].get("trace") != FORMAT:
        found = parsed[0].get("trace") if parsed else "an empty file"
        raise TraceError(f"a trace must begin with format {FORMAT}; got {found} in {path}.")
    header, steps = parsed[0], parsed[1:]
    if header.get("precision") not in PRECISIONS or not isinstance(header.get("seed"), int):
        raise TraceError(f"a trace's header must name precision and seed; got {header} in {path}.")
    for number, line in enumerate(steps, 2):
        _check(path, number, line)
    numbers = [line["step"] for line in steps]
    if numbers != sorted(set(numbers)):
        raise TraceError(f"a trace's steps must ascend; got {numbers[:20]} in {path}.")
    if not any(numbers):
        raise TraceError(f"a trace must hold at least one step; got none in {path}.")
    return Trace({"side": Path(path).stem} | header, steps)


def _parse(path, number, line) -> dict:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise TraceError(f"line {number} of {path} must be a JSON object; got {line[:60]!r}.")
    return value


def _check(path, number, line) -> None:
    if not isinstance(line.get("step"), int):
        raise TraceError(f"line {number} of {path} must name its step; got {sorted(line)}.")
    if line["step"] and not {"batch", "loss"} <= line.keys():
        raise TraceError(f"line {number} of {path} must have batch and loss; got {sorted(line)}.")
    for quantity in QUANTITIES:
        for name, values in line.get(quantity, {}).items():
            if len(values) != DIGEST:
                raise TraceError(
                    f"line {number} of {path}: {quantity} of {name} must have {DIGEST} numbers; "
                    f"got {len(values)}."
                )
            line[quantity][name] = np.array(values, np.float64)  # "nan", "inf" are read as such
    for name in ("loss", "grad_norm"):
        if name in line:
            line[name] = float(line[name])


def batches_of(trace: Trace):
    """Yields the batches that a trace holds: {"tokens", and "docs" with padding}, int32 [B,T+1].

    Raises:
        TraceError: a step holds none.
    """
    for line in trace.steps:
        if line["step"]:
            if "tokens" not in line:
                raise TraceError(
                    f"to train on the batches of a trace it must hold them; step {line['step']} of "
                    f"{trace.name} does not. Record it with keep_batches."
                )
            names = [name for name in ("tokens", "docs") if name in line]
            yield {name: np.array(line[name], np.int32) for name in names}

"""Reads and rewinds metrics.jsonl and the other files of one JSON object per line."""

import json
from pathlib import Path

from jaxtrain.files import strict_json, write_atomic

FILE = "metrics.jsonl"


NOT_JSON = ("nan", "inf", "-inf")


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, floats as written; one torn at the end is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is not a JSON object with a step.
    """
    lines = Path(path).read_bytes().split(b"\n")
    while lines and not lines[-1]:
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"] += 0
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # a kill between two bytes of the last write
                break
            what = f"each line of {Path(path).name} must be a JSON object with a step"
            where = f"got {line[:80]!r} in {path}, line {number}"
            raise ValueError(f"{what}; {where}. Remove the line.") from error
        records.append({k: float(v) if v in NOT_JSON else v for k, v in record.items()})
    return records


def rewind_metrics(path: Path, step: int) -> list[dict]:
    """Drops a metrics.jsonl's lines after `step`, all if it is 0, in one rename; returns them."""
    if not path.exists():
        return []
    kept, removed = [], []
    for record in read_metrics(path):
        (kept if 0 < step and record["step"] <= step else removed).append(record)
    text = "".join(strict_json(record) + "\n" for record in kept)
    if text.encode() != path.read_bytes():
        write_atomic(path, text)
    return removed

"""Reads JSON and JSON-lines files; errors name the damaged file or line."""

import json
from pathlib import Path
from typing import Any

NOT_JSON = ("nan", "inf", "-inf")  # JSON has no such numbers, so the trainer writes strings


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} must be a readable file; got {error.strerror}.") from None


def read_json(path: Path) -> Any:
    """Returns a JSON file's value; None if the file is missing.

    Raises:
        ValueError: the file cannot be read, or is not JSON.
    """
    data = _read_bytes(path)
    try:
        return None if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON; got: {error}. Is it a run's file?") from None


def read_json_lines(path: Path) -> list[dict]:
    """Returns a JSON-lines file's objects, without an incomplete last line; [] if it is missing.

    Raises:
        ValueError: the file cannot be read, or a line is not a JSON object.
    """
    data = _read_bytes(path) or b""
    lines = data.split(b"\n")
    complete = [line for line in lines[:-1] if line]
    try:  # as one array, which takes half of the time
        records = json.loads(b"[%s]" % b",".join(complete))
        objects = all(type(record) is dict for record in records)
        if objects and len(records) == len(complete) and not lines[-1]:
            special = b'nan"' in data or b'inf"' in data
            return [parse_numbers(record) for record in records] if special else records
    except (ValueError, RecursionError):
        pass  # find the line that is wrong
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(parse_numbers(json.loads(line)))
        except (ValueError, AttributeError, RecursionError):
            if number == len(lines):  # it has no newline yet, so it is still being written
                break
            raise ValueError(
                f"{path}, line {number} must be a JSON object; got {line[:80]!r}. Remove it."
            ) from None
    return records


def parse_numbers(record: dict) -> dict:
    """Returns a record with the numbers that the trainer wrote as strings."""
    return {k: float(v) if v in NOT_JSON else v for k, v in record.items()}

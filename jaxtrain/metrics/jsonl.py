"""Reads, appends to and rewinds metrics.jsonl and the other files with one JSON object per line.

A line of metrics.jsonl is `{"step": int, "time": UTC seconds, "group/name_unit": number, ...}`.
Floats have full precision; those that JSON cannot express are the strings "nan", "inf" and "-inf".
"""

import json
from pathlib import Path

from jaxtrain.file_errors import Appender
from jaxtrain.files import strict_json, write_atomic

FILE = "metrics.jsonl"
NOT_JSON = ("nan", "inf", "-inf")


class MetricsFile:
    """Appends metrics to workdir/metrics.jsonl, one line for each write().

    A line has reached the operating system when write() returns, so killing the process loses none.

    Args:
        workdir: existing folder of the run.
        resume_step: step from which this process resumes; later lines are removed.

    Attributes:
        removed_lines: number of removed lines.
        removed_s: seconds from the first to the last of them; 0 if nothing is resumed.
    """

    def __init__(self, workdir: Path, resume_step: int = 0):
        removed = rewind_metrics(workdir / FILE, resume_step)
        self.removed_lines, self.removed_s = len(removed), 0.0
        if removed and resume_step:
            self.removed_s = max(removed[-1]["time"] - removed[0]["time"], 0.0)
        self._lines = Appender(workdir / FILE)

    def write(self, step: int, time_s: float, metrics: dict[str, int | float]) -> None:
        """Appends one line.

        Raises:
            OSError: the file system refuses, for example because it is full.
        """
        line = strict_json({"step": step, "time": time_s} | metrics)
        self._lines.write(line.encode() + b"\n")  # one write: a reader sees all of a line or none

    def close(self) -> None:
        self._lines.close()


def read_metrics(path: str | Path) -> list[dict]:
    """Returns the lines of a metrics.jsonl, without a last line that is cut off.

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
            record["step"] += 0  # raises unless it is a number
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # the process was killed in the middle of its last write
                break
            raise ValueError(
                f"each line of {Path(path).name} must be a JSON object with a step; got "
                f"{line[:80]!r} in {path}, line {number}. Remove the line."
            ) from error
        records.append({k: float(v) if v in NOT_JSON else v for k, v in record.items()})
    return records


def rewind_metrics(path: Path, step: int) -> list[dict]:
    """Removes and returns the lines after `step`, or all lines if `step` is 0.

    The file is replaced in one rename.
    """
    if not path.exists():
        return []
    remaining, removed = [], []
    for record in read_metrics(path):
        (remaining if 0 < step and record["step"] <= step else removed).append(record)
    text = "".join(strict_json(record) + "\n" for record in remaining)
    if text.encode() != path.read_bytes():
        write_atomic(path, text)
    return removed

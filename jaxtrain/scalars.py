"""Metrics on disk: metrics.jsonl for programs, TensorBoard events for eyes, rewound on resume.

A line of metrics.jsonl is `{"step": int, "time": UTC seconds, "group/name_unit": number, ...}`,
floats in full precision and those that JSON lacks as "nan", "inf" and "-inf".
"""

import json
import numbers
import os
import socket
import time
from pathlib import Path

from jaxtrain.disk import Appender
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


class ScalarLog:
    """Appends metrics to workdir/metrics.jsonl and to a TensorBoard event file.

    A line has reached the system when write() returns: a kill of the process loses none.

    Args:
        workdir: existing folder of the run.
        resume_step: the step that this process resumes from; what was logged after it goes.

    Attributes:
        removed_lines: number of lines that went.
        removed_s: seconds from the first to the last of them; 0 where nothing is resumed.
    """

    def __init__(self, workdir: Path, resume_step: int = 0):
        removed = rewind_metrics(workdir / FILE, resume_step)
        self.removed_lines, self.removed_s = len(removed), 0.0
        if removed and resume_step:
            self.removed_s = max(removed[-1]["time"] - removed[0]["time"], 0.0)
        self._lines = Appender(workdir / FILE)
        self._events = _EventFile(workdir, resume_step + 1 if resume_step else 0)

    def write(self, step: int, metrics: dict) -> dict[str, int | float]:
        """Appends one line; returns the metrics as plain numbers.

        Raises:
            ValueError: a metric is not a scalar number.
        OSError: the disk is full, or refuses for another reason; the path is in it.
        """
        now_s = time.time()
        numbers_ = {name: _number(name, value) for name, value in metrics.items()}
        line = strict_json({"step": int(step), "time": now_s} | numbers_)
        self._lines.write(line.encode() + b"\n")  # at once: a reader sees a line or none
        self._events.write(int(step), now_s, numbers_)
        return numbers_

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def _number(name: str, value) -> int | float:
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise ValueError(f"a metric must be one number; got {name}={value!r}. Reduce it first.")
    return value


class _EventFile:
    """TensorBoard's record file, written here: its own writer imports TensorFlow if it can."""

    def __init__(self, workdir: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)  # names must sort in time
        name = f"{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(Appender(workdir / f"events.out.tfevents.{name}"))
        self._append(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(step=first_step, session_log=start)  # readers drop what is at or after it

    def write(self, step, now_s, metrics):
        value = self._summary.Value
        values = [value(tag=name, simple_value=number) for name, number in metrics.items()]
        self._append(now_s, step=step, summary=self._summary(value=values))

    def _append(self, now_s=None, **fields):
        event = self._event(wall_time=now_s or time.time(), **fields)
        self._records.write(event.SerializeToString())

    def close(self):
        self._records.close()

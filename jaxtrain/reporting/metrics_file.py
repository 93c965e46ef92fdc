"""Metrics on disk: metrics.jsonl for programs, TensorBoard events for eyes, rewound on resume.

A line of metrics.jsonl is `{"step": int, "time": UTC seconds, "group/name_unit": number, ...}`,
floats in full precision and those that JSON lacks as "nan", "inf" and "-inf".
"""

import numbers
import time
from pathlib import Path

from jaxtrain.file_errors import Appender
from jaxtrain.files import strict_json
from jaxtrain.metrics.jsonl import FILE, rewind_metrics
from jaxtrain.reporting.tensorboard import EventFile


class MetricsFile:
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
        self._events = EventFile(workdir, resume_step + 1 if resume_step else 0)

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

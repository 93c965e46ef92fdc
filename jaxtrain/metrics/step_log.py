"""hosts/PROCESS.jsonl: every step of one process, and those that took too long with the reason.

A line is {"step", "time" (UTC s), "perf/step_time_s", "data/wait_s"}, with several hosts also
{"comm/wire_sent_bytes", "comm/wire_received_bytes"}, and {"first": true} where it is the first
after a start. An event is {"step", "time", "event": "outlier", "perf/step_time_s", "cause"}. Lines
are written when flush() is called, not step by step.
"""

import gc
import json
import statistics
import time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from jaxtrain.file_errors import Appender
from jaxtrain.metrics.jsonl import read_metrics, rewind_metrics

FOLDER = "hosts"
HISTORY = 200  # steps that say what is usual
LEAST = 10  # steps, before any is called unusual
TIMES, SIGMAS = 1.5, 3.0  # of the median, and above it
SIGMA_OF_MAD = 1.4826  # of a normal distribution
SHARE = 0.25  # of the time too much that a cause must have taken to be named


class Row(NamedTuple):
    """A step of one process; seconds, and bytes since the step before."""

    step: int
    time: float
    step_time_s: float
    wait_s: float
    wire: tuple[int, int] | None  # sent, received
    beside: tuple[str, ...]  # what went on in the background, or had just ended
    causes_s: dict[str, float]  # cause -> seconds that the step may have waited for it

    def as_json(self) -> str:
        """Written by hand: json.dumps takes five times as long, and these are finite numbers."""
        line = f'"step": {self.step}, "time": {self.time!r}, "perf/step_time_s": '
        line += f'{self.step_time_s!r}, "data/wait_s": {self.wait_s!r}'
        if self.wire:
            sent, received = self.wire
            line += f', "comm/wire_sent_bytes": {sent}, "comm/wire_received_bytes": {received}'
        if "start" in self.beside:
            line += ', "first": true'
        return f"{{{line}}}"


class StepLog:
    """Keeps a process's steps until flush().

    Args:
        workdir: of the run; made if missing.
        process: this one's index.
        resume_step: the step that this process resumes from; lines after it go.
    """

    def __init__(self, workdir: Path, process: int, resume_step: int = 0):
        self.path = path = Path(workdir) / FOLDER / f"{process}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rewind_metrics(path, resume_step)
        self._file = Appender(path)
        self._rows, self._usual_s = [], deque(maxlen=HISTORY)
        self.outliers = Counter()  # cause -> steps
        self._collecting_s, self.gc_s = 0.0, 0.0  # collector's time since it was last taken
        gc.callbacks.append(self._watch_collector)

    def _watch_collector(self, phase, info):
        if phase == "start":
            self._collecting_s = time.perf_counter()
        elif self._collecting_s:
            self.gc_s += time.perf_counter() - self._collecting_s

    def add(self, step, step_time_s, wait_s, wire=None, beside=(), causes_s=None) -> None:
        """A step has ended; the garbage collector's time since the last one is known in here."""
        causes_s = {"data": wait_s, "gc": self.gc_s} | (causes_s or {})
        self.gc_s = 0.0
        row = Row(step, time.time(), step_time_s, wait_s, wire, tuple(beside), causes_s)
        self._rows.append(row)

    def flush(self, wait_s: float = 0.0) -> None:
        """Writes the steps since the last flush in one go, each outlier after its step.

        Args:
            wait_s: nothing is written while the oldest step is younger.
        """
        rows = self._rows
        if not rows or time.time() - rows[0].time < wait_s:
            return
        times_s = [*self._usual_s, *(row.step_time_s for row in rows)]
        median_s = statistics.median(times_s)
        sigma_s = SIGMA_OF_MAD * statistics.median(abs(s - median_s) for s in times_s)
        limit_s = max(TIMES * median_s, median_s + SIGMAS * sigma_s)
        lines = []
        for row in rows:
            lines.append(row.as_json())
            if row.step_time_s > limit_s and len(times_s) >= LEAST:
                cause = explain(row, row.step_time_s - median_s)
                self.outliers[cause] += 1
                event = {"step": row.step, "time": row.time, "event": "outlier"}
                event |= {"perf/step_time_s": row.step_time_s, "cause": cause}
                lines.append(json.dumps(event))
        self._usual_s.extend(row.step_time_s for row in rows)
        rows.clear()
        self._file.write(("\n".join(lines) + "\n").encode())

    def close(self) -> None:
        gc.callbacks.remove(self._watch_collector)
        try:
            self.flush()
        finally:
            self._file.close()


def read_step_times(path: Path) -> list[float]:
    """Returns the seconds of every step in a hosts/N.jsonl but the first after each start.

    The first step after a start also pays for what the device does once.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line of it is damaged.
    """
    lines = [record for record in read_metrics(path) if "event" not in record]
    times_s = {line["step"]: line["perf/step_time_s"] for line in lines}
    first = {line["step"] for line in lines if line.get("first")} | {min(times_s, default=0)}
    return [s for step, s in times_s.items() if step not in first]


def explain(row: Row, excess_s: float) -> str:
    """What coincided with a step that took excess_s too long: `save+gc`, or `unknown`."""
    timed = [cause for cause, s in row.causes_s.items() if s > 0 and s >= SHARE * excess_s]
    return "+".join(dict.fromkeys([*row.beside, *timed])) or "unknown"

"""Writes hosts/PROCESS.jsonl: every step of one process, and which steps were outliers and why.

A line is {"step", "time" (UTC s), "perf/step_time_s", "data/wait_s"}. With several hosts it also
has {"comm/wire_sent_bytes", "comm/wire_received_bytes"}, and the first step after a start, and of
another batch size, has {"first": true}. An outlier adds a line {"step", "time", "event": "outlier",
"perf/step_time_s", "cause"}, and a probe of jaxtrain.metrics.rank_watch one with the event "probe".
Lines are buffered until flush(), so that a step costs no system call.
"""

import gc
import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxtrain.file_errors import Appender
from jaxtrain.metrics.jsonl import read_metrics, rewind_metrics

FOLDER = "hosts"
# A step is an outlier if it takes more than TIMES x the median of the last HISTORY steps, and also
# SIGMAS standard deviations more than the median. The first bound tolerates the jitter of very
# regular steps, the second one steps that always vary. Sigma is estimated from the median absolute
# deviation, which outliers hardly move; SIGMA_OF_MAD is their ratio for a normal distribution.
HISTORY = 200
MIN_STEPS = 10  # with fewer steps, none is called an outlier
TIMES, SIGMAS = 1.5, 3.0
SIGMA_OF_MAD = 1.4826
NEW_SIZE = "size"  # an activity: the step is the first one of its batch size in this process
SHARE = 0.25  # a cause is named if it explains at least this share of the excess time


class StepRecord(NamedTuple):
    """One step of one process."""

    step: int
    time: float  # UTC s
    step_time_s: float
    wait_s: float
    wire_bytes: tuple[int, int] | None  # sent, received during the step
    activities: tuple[str, ...]  # running in the background, or ended just before the step
    causes_s: Mapping[str, float]  # cause -> seconds for which it may have delayed the step

    def to_json(self) -> str:
        """Returns a line of JSON, five times as fast as json.dumps; all numbers are finite."""
        line = f'"step": {self.step}, "time": {self.time!r}, "perf/step_time_s": '
        line += f'{self.step_time_s!r}, "data/wait_s": {self.wait_s!r}'
        if self.wire_bytes:
            sent, received = self.wire_bytes
            line += f', "comm/wire_sent_bytes": {sent}, "comm/wire_received_bytes": {received}'
        if "start" in self.activities or NEW_SIZE in self.activities:
            line += ', "first": true'
        return f"{{{line}}}"


class StepLog:
    """Buffers the steps of one process and writes them on flush().

    Args:
        workdir: folder of the run; created if missing.
        process: index of this process.
        resume_step: step from which this process resumes; later lines are removed.
    """

    def __init__(self, workdir: Path, process: int, resume_step: int = 0):
        self.path = path = Path(workdir) / FOLDER / f"{process}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rewind_metrics(path, resume_step)
        self._file = Appender(path)
        self._buffer: list[StepRecord] = []
        self._oldest_s = 0.0  # when the first buffered step ended, by the monotonic clock
        self._recent_s = deque(maxlen=HISTORY)  # step times in the file
        self.outliers = Counter()  # cause -> steps
        self.gc_s = 0.0  # time in the garbage collector since the last step
        self._gc_started_s = 0.0
        gc.callbacks.append(self._time_garbage_collector)

    def _time_garbage_collector(self, phase: str, info: dict) -> None:
        if phase == "start":
            self._gc_started_s = time.perf_counter()
        elif self._gc_started_s:
            self.gc_s += time.perf_counter() - self._gc_started_s

    def add(
        self,
        step: int,
        step_time_s: float,
        wait_s: float,
        wire_bytes: tuple[int, int] | None = None,
        activities: Iterable[str] = (),
        causes_s: Mapping[str, float] | None = None,
    ) -> None:
        """Buffers a step that has just ended; see StepRecord for the arguments."""
        causes_s = {"data": wait_s, "gc": self.gc_s, **(causes_s or {})}
        self.gc_s = 0.0
        if not self._buffer:
            self._oldest_s = time.monotonic()
        self._buffer.append(
            StepRecord(
                step, time.time(), step_time_s, wait_s, wire_bytes, tuple(activities), causes_s
            )
        )

    def flush(self, wait_s: float = 0.0) -> None:
        """Writes the buffered steps in one go, each outlier after its step.

        Args:
            wait_s: nothing is written while the oldest buffered step is younger than this.
        """
        records = self._buffer
        if not records or time.monotonic() - self._oldest_s < wait_s:
            return
        times_s = [*self._recent_s, *(record.step_time_s for record in records)]
        median_s = statistics.median(times_s)
        sigma_s = SIGMA_OF_MAD * statistics.median(abs(s - median_s) for s in times_s)
        limit_s = max(TIMES * median_s, median_s + SIGMAS * sigma_s)
        lines = []
        for record in records:
            lines.append(record.to_json())
            if record.step_time_s > limit_s and len(times_s) >= MIN_STEPS:
                cause = name_cause(record, record.step_time_s - median_s)
                self.outliers[cause] += 1
                event = {"step": record.step, "time": record.time, "event": "outlier"}
                event |= {"perf/step_time_s": record.step_time_s, "cause": cause}
                lines.append(json.dumps(event))
        self._recent_s.extend(record.step_time_s for record in records)
        records.clear()
        self._file.write(("\n".join(lines) + "\n").encode())

    def forget_times(self) -> None:
        """Later steps are not compared with earlier ones, to find outliers."""
        self.flush()
        self._recent_s.clear()

    def add_event(self, step: int, event: str, values: Mapping[str, object]) -> None:
        """Writes a line with an event, after the steps before it."""
        self.flush()
        line = {"step": step, "time": time.time(), "event": event} | dict(values)
        self._file.write(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        gc.callbacks.remove(self._time_garbage_collector)
        try:
            self.flush()
        finally:
            self._file.close()


def read_step_times(path: Path) -> dict[int, float]:
    """Returns {step: seconds} of a hosts/N.jsonl, without those that have "first".

    These are the first after each start and of each batch size, which include work that the device
    does only once.

    Raises:
        OSError: the file cannot be read.
        ValueError: one of its lines is damaged.
    """
    lines = [record for record in read_metrics(path) if "event" not in record]
    times_s = {line["step"]: line["perf/step_time_s"] for line in lines}
    first = {line["step"] for line in lines if line.get("first")} | {min(times_s, default=0)}
    return {step: s for step, s in times_s.items() if step not in first}


def name_cause(record: StepRecord, excess_s: float) -> str:
    """Returns what coincided with a step that took excess_s too long: `save+gc`, or `unknown`."""
    timed = [cause for cause, s in record.causes_s.items() if s > 0 and s >= SHARE * excess_s]
    return "+".join(dict.fromkeys([*record.activities, *timed])) or "unknown"

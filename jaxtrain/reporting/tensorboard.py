"""Writes TensorBoard's event file without TensorFlow."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from jaxtrain.file_errors import Appender


class EventFile:
    """A TensorBoard event file; TensorBoard's own writer would import TensorFlow if installed.

    A resumed run rewinds without touching the old event files: the new file starts with a
    SessionLog.START event at the first new step, and TensorBoard drops all events of older files at
    that step or later.

    Args:
        workdir: existing folder of the run.
        first_step: first step that this process will write.
    """

    def __init__(self, workdir: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Any: protobuf creates the classes at import, where type checkers cannot see them.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        # TensorBoard reads a folder's files in the order of their names, so names sort by time.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(Appender(workdir / f"events.out.tfevents.{name}"))
        self._append(time.time(), file_version="brain.Event:2")
        start = events.SessionLog(status=events.SessionLog.START)
        self._append(time.time(), step=first_step, session_log=start)

    def write(self, step: int, time_s: float, metrics: dict[str, int | float]) -> None:
        """Appends one event with all metrics of a step."""
        value = self._summary.Value
        values = [value(tag=name, simple_value=number) for name, number in metrics.items()]
        self._append(time_s, step=step, summary=self._summary(value=values))

    def _append(self, time_s: float, **fields) -> None:
        event = self._event(wall_time=time_s, **fields)
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._records.close()

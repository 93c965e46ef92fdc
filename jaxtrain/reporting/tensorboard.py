"""TensorBoard's event file, written without TensorFlow."""

import os
import socket
import time
from pathlib import Path

from jaxtrain.file_errors import Appender


class EventFile:
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

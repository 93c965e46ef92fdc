"""A pipe that knows when bytes last came from it."""

import io
import time
from typing import Any


class TimedPipe(io.RawIOBase):
    """Reads from a pipe. `readline` blocks until a line is complete, so it shows no progress.

    Attributes:
        heard_at: when bytes last came, in seconds of time.monotonic().
    """

    def __init__(self, pipe: io.BufferedReader):
        self._pipe, self.heard_at = pipe, time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._pipe.readinto1(buffer)
        self.heard_at = time.monotonic()
        return count

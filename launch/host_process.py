"""The process of one request on a host.

A login shell may print a greeting before our code runs. The answer therefore begins after a line
that only this request knows. Output before that line is only quoted if no answer comes.
"""

import contextlib
import io
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from launch.explain import explain
from launch.inventory import Host
from launch.timed_pipe import TimedPipe

LINE_BYTES = 16 << 20  # the longest line of an answer; run files come in parts of 4 MiB
PREAMBLE_BYTES = 1 << 16  # the most that a host may print before its answer
FAREWELL_S = 1.0  # time to end after the answer
END_S = 5.0  # time for ssh to end after its output
SEND_S = 60.0  # the longest time for a host to take a request, or 256 KiB of an archive


class HostError(Exception):
    """A host could not be reached, or could not do what it was asked. The text says what to do."""


class HostProcess:
    """A request's process. A context manager that ends it.

    Args:
        argv: the ssh command.
        request: what to send first; more may be sent later.
        mark: the line after which the answer begins.

    Attributes:
        output: knows when bytes last came from the host.
    """

    def __init__(self, argv: list[str], request: bytes, mark: bytes):
        pipe = subprocess.PIPE
        self._process: Any = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe)
        self._mark, self._preamble, self._answering = mark, b"", False
        self._errors, self._expired = b"", False
        self._drain = threading.Thread(target=self._read_errors, daemon=True)
        self._drain.start()
        self.send(request, SEND_S)
        self.output = TimedPipe(self._process.stdout)
        self._reader = io.BufferedReader(self.output)

    def __enter__(self) -> "HostProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_errors(self) -> None:
        """Reads standard error to its end, so that a host never waits for us; keeps its tail."""
        with self._process.stderr as errors:
            while data := errors.read1(1 << 16):
                self._errors = (self._errors + data)[-PREAMBLE_BYTES:]

    def send(self, data: bytes, limit_s: float | None = None) -> bool:
        """Writes to the request's standard input; returns False if it no longer reads.

        Args:
            limit_s: the process is killed if the host takes longer to read.
        """
        try:
            with self._limit(limit_s):
                self._process.stdin.write(data)
                self._process.stdin.flush()
        except (OSError, ValueError):  # the process or the pipe is gone; readline() notices it
            return False
        return True

    def end_input(self) -> None:
        """Closes the request's standard input."""
        try:
            self._process.stdin.close()
        except OSError:  # ssh has ended before it read everything
            pass

    def readline(self, limit_s: float | None = None) -> bytes:
        """Returns the next line of the answer; b"" at its end.

        Args:
            limit_s: the process is killed if the line takes longer.

        Raises:
            TimeoutError: it took longer, or the process was killed because of another limit.
        """
        with self._limit(limit_s):
            line = self._find_mark() and self._reader.readline(LINE_BYTES)
        if not line and self._expired:
            raise TimeoutError("no answer in time")
        return line or b""

    @contextlib.contextmanager
    def _limit(self, limit_s: float | None) -> Iterator[None]:
        timer = threading.Timer(limit_s or 0.0, self.expire)
        timer.daemon = True
        if limit_s is not None:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def read(self, size: int) -> bytes:
        """Returns the next bytes of the answer; fewer only at its end."""
        return self._reader.read(size)

    def _find_mark(self) -> bool:
        while not self._answering and len(self._preamble) < PREAMBLE_BYTES:
            line = self._reader.readline(PREAMBLE_BYTES)
            self._answering = line.strip() == self._mark
            if not line:
                break
            self._preamble += b"" if self._answering else line
        if len(self._preamble) >= PREAMBLE_BYTES:
            self.kill()
        return self._answering

    def kill(self) -> None:
        self._process.kill()

    def expire(self) -> None:
        """Kills the process because its time is over, unless it has ended."""
        if self.is_running():
            self._expired = True
            self.kill()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process, after FAREWELL_S if its input has ended, and closes its pipes."""
        if self._process.stdin.closed:
            try:
                self._process.wait(FAREWELL_S)
            except subprocess.TimeoutExpired:
                pass
        self._process.kill()
        self._process.wait()
        self.end_input()
        self._process.stdout.close()
        self._drain.join(FAREWELL_S)  # no longer: a shared connection that ssh leaves may hold it

    def explain(self, host: Host) -> HostError:
        """Returns why there is no answer, and ends the process if it does not end by itself."""
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:  # the host closed its output, but goes on
            self.kill()
            self._process.wait()
        self._drain.join(FAREWELL_S)
        return HostError(explain(host, self._process.returncode, self._preamble, self._errors))

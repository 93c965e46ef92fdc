"""Runs a process group with a time limit; the parents of GPU measurements use it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, Any


class ChildProcess:
    """A process in its own group, so that all processes that it starts can be ended with it.

    torch.compile's workers, for example, would otherwise live on and slow the next measurement.
    """

    def __init__(self, argv: Sequence[str], output: IO[Any], env: Mapping[str, str] | None = None):
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
        )

    def send_line(self) -> None:
        """Writes an empty line to the child's stdin; no error if the child has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def wait(self, limit_s: float) -> int | None:
        """Returns the exit status, or None if the process did not end in time; ends the group."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends every process of the group."""
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

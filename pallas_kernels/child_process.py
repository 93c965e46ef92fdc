"""Runs a process group with a time limit; the parents of GPU measurements use it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

TAIL_BYTES = 65_536  # of a log, in which its last lines are looked for


class ChildProcess:
    """A process in its own group, so that all processes that it starts can be ended with it.

    torch.compile's workers, for example, would otherwise live on and slow the next measurement. A
    Ctrl-C in the terminal does not reach the group: the parent must call `kill`.
    """

    def __init__(self, argv: Sequence[str], output: IO[Any], env: Mapping[str, str] | None = None):
        self._ended = False
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
        )

    def send_line(self, text: str) -> None:
        """Writes a line to the child's stdin; no error if the child has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{text}\n".encode())
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
        """Ends every process of the group. The second call does nothing."""
        if self._ended:  # another process may have the id by now
            return
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ended = True
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit in the block, so that its children are ended as by Ctrl-C.

    They are in groups of their own, so they would outlive a plain SIGTERM to this process.
    """
    old_handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old_handler)


def last_lines(path: Path, most: int, start: int = 0) -> str:
    """Returns the last three lines of a log as one line of at most `most` characters.

    Args:
        start: the byte at which the log begins.
    """
    with open(path, "rb") as file:
        file.seek(max(start, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return " | ".join(text.strip().splitlines()[-3:])[-most:]

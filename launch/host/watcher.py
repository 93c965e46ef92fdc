"""Runs launch.host.watch beside a supervisor's ranks; replaces it if it is killed or stopped."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable

from launch.host import processes, watch

RETRY_S = 10.0  # between two starts: a host on which it always ends must not fill the log


class Watcher:
    """The process that ends the ranks if this one ends or is stopped; none before `start`.

    Args:
        limit_s: seconds without a call of `show_life` after which it kills the ranks.
        write_log: writes a line to the job's log.
    """

    def __init__(self, limit_s: float, write_log: Callable[[str], object]):
        self._limit_s, self._write_log = limit_s, write_log
        self._process: subprocess.Popen | None = None
        self._mark, self._started_at = "", -math.inf

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, mark: str) -> None:
        """Starts to watch over the processes whose environment contains `mark`."""
        self.end()
        self._mark = mark
        self._start_process()

    def _start_process(self) -> None:
        self._started_at = time.monotonic()
        source = watch.__loader__.get_source(watch.__name__)  # from memory, or from a file
        argv = [sys.executable, "-I", "-S", "-c", source, self._mark, str(self._limit_s)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                argv, stdin=pipe, stdout=null, stderr=null, env={}, start_new_session=True
            )
            assert self._process.stdin
            os.set_blocking(self._process.stdin.fileno(), False)
        except OSError as error:
            self._write_log(f"nothing watches this supervisor: {error}")

    def show_life(self) -> None:
        """Shows that this process runs, and starts another watcher if there is none that runs."""
        if not self._mark or not (problem := self._find_problem()):
            return
        if time.monotonic() - self._started_at > RETRY_S:
            self._write_log(f"the watcher of this supervisor {problem}: starting another one")
            self._end_process()
            self._start_process()

    def _find_problem(self) -> str:
        if not self._process or not self._process.stdin:
            return "could not be started"
        try:
            os.write(self._process.stdin.fileno(), b"\n")
        except BrokenPipeError:
            return "has ended"
        except OSError:  # it is stopped and its pipe full
            pass
        stat = processes.read_stat(self._process.pid)
        return "is stopped by a signal" if stat and stat.state in "Tt" else ""

    def end(self) -> None:
        self._mark = ""
        self._end_process()

    def _end_process(self) -> None:
        if self._process:
            self._process.kill()  # at the end of its input it would also end, but not if stopped
            self._process.communicate()
        self._process = None

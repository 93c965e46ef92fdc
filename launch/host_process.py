"""The process of one request on a host, and why a host did not answer.

A login shell may print a greeting before our code runs. The answer therefore begins after a line
that only this request knows. What came before it does no harm, and is quoted if no answer comes.
"""

import contextlib
import io
import re
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from launch.inventory import Host
from launch.terminal import visible
from launch.timed_pipe import TimedPipe

LINE_BYTES = 16 << 20  # the longest line of an answer; run files come in parts of 4 MiB
PREAMBLE_BYTES = 1 << 16  # the most that a host may print before its answer
QUOTED = 300  # characters of a host's output in an error
FAREWELL_S = 1.0  # time to end after the answer
END_S = 5.0  # time for ssh to end after its output
SEND_S = 60.0  # the longest time for a host to take a request, or 256 KiB of an archive

SSH_ERROR = 255  # ssh's exit status if the connection failed, not the command
SSH_LINES = 4  # at the end of standard error are ssh's own; before them may be the host's banner
NOT_FOUND = 127  # a shell's exit status if it did not find the command

# (pattern, what happened, what to do): causes that ssh reports in its last lines, with SSH_ERROR.
# The first match counts. `{target}` is the ssh destination, `{python}` the inventory's Python.
SSH_CAUSES = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
        "its host key is not the one known here",
        "If it was installed again, remove the old key with `ssh-keygen -R {name}` and compare the "
        "new one. Otherwise another machine may be answering in its place.",
    ),
    (
        "Host key verification failed|No .* host key is known",
        "its host key is not known here",
        "Run `ssh {target}` once and compare the fingerprint with the host's own.",
    ),
    (
        "Could not resolve hostname",
        "its name has no address",
        "Correct ssh in the inventory, or add the name to ssh's configuration.",
    ),
    (
        "Connection refused",
        "nothing listens on its ssh port",
        "Start sshd there, or correct port in the inventory.",
    ),
    (
        "timed out|No route to host|Network is unreachable|Host is down",
        "it cannot be reached",
        "Check that it is on, and the network, VPN and firewall between here and there.",
    ),
    (
        "communication with agent failed|agent refused operation|signing failed",
        "the ssh agent did not sign with its key",
        "Look at `ssh-add -l`, and unlock the agent or the hardware key.",
    ),
    (
        "Too many authentication failures",
        "ssh offered it too many keys before the right one",
        "Set `IdentitiesOnly yes` and `IdentityFile` for it in ssh's configuration.",
    ),
    (
        "Permission denied \\(",
        "it accepts no key that ssh offered",
        "Load your key into the agent (`ssh-add`), or add it there (`ssh-copy-id {target}`). Check "
        "user in the inventory.",
    ),
    (
        "Connection closed|Connection reset|kex_exchange_identification",
        "its sshd closed the connection",
        "Look into its log (`journalctl -u ssh`); it may limit the number of connections.",
    ),
)
# Causes that the host itself reports, on either stream and with any other exit status.
HOST_CAUSES = (
    (
        "account is currently not available|nologin",
        "its account has no login shell",
        "Give the account a shell there (`chsh -s /bin/bash`), or name another user.",
    ),
    (
        "python must be 3.11",
        "its Python is too old",
        "Set python in the inventory to Python 3.11 or newer.",
    ),
)
ABSENT = (
    "it has no program {python}",
    "Set python in the inventory to Python 3.11 or newer.",
)
FORCED = (
    "it printed something and did not run our command",
    "A forced command in authorized_keys, or a restricted shell, may replace it. Use a key without "
    "one.",
)
BROKEN = (
    "its connection broke",
    "Check that it is on, and the network between here and there; then try again.",
)
SILENT = ("it gave no answer", "Try `ssh {target} {python} --version` by hand.")


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


def explain(host: Host, code: int, output: bytes, errors: bytes) -> str:
    """Returns why a host did not answer, what it printed, and what to do.

    Args:
        code: the exit status of ssh; negative if it was killed.
        output: what the host printed on standard output, without an answer.
        errors: what ssh or the host printed on standard error.
    """
    happened, remedy = _find_cause(host, code, output, errors)
    words = {"name": host.target.rpartition("@")[2], "target": host.target, "python": host.python}
    happened, remedy = happened.format(**words), remedy.format(**words)
    pairs = (("stdout", _quote(output)), ("stderr", _quote(errors)))
    quoted = "".join(f', {where} "{text}"' for where, text in pairs if text)
    end = f"ended with {code}" if code >= 0 else "did not end and was killed"
    return f"{host.name}: {happened}. `ssh {host.target}` {end}{quoted}. {remedy}"


def _find_cause(host: Host, code: int, output: bytes, errors: bytes) -> tuple[str, str]:
    """Returns what happened and what to do."""
    printed, errors_text = output.decode(errors="replace"), errors.decode(errors="replace")
    causes, text = HOST_CAUSES, f"{printed}\n{errors_text}"
    if code == SSH_ERROR:
        causes, text = SSH_CAUSES, "\n".join(errors_text.splitlines()[-SSH_LINES:])
    for pattern, happened, remedy in causes:
        if re.search(pattern, text):
            return happened, remedy
    if code == SSH_ERROR:
        return BROKEN
    program = re.escape(host.python.rpartition("/")[2])
    # csh ends with 1 instead; a login script may have missed another program
    missing = f"(?i){program}.*(not found|no such file)|not found: .*{program}"
    if code == NOT_FOUND or re.search(missing, errors_text):
        return ABSENT
    return FORCED if printed.split() else SILENT


def _quote(data: bytes) -> str:
    """Returns the end of what was printed, where the cause is, as one line."""
    text = visible(" ".join(data.decode(errors="replace").split()))
    return text if len(text) <= QUOTED else f"...{text[-QUOTED:]}"

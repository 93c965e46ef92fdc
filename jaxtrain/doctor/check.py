"""Defines the result of a check, and runs checks and programs that may fail or hang."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

KILLED_S = 1.0  # time that a killed program has to end
OK, WARNING, PROBLEM = "ok", "warning", "problem"
# Returns the version of an installed package, or None.
InstalledVersion = Callable[[str], str | None]


class Check(NamedTuple):
    """One line of the report.

    Attributes:
        name: what was checked, in one or two words.
        value: what was found.
        state: OK, WARNING (training works, or this part is optional) or PROBLEM.
        fix: a shell command that fixes it; empty if there is nothing to fix or no command does.
    """

    name: str
    value: str
    state: str = OK
    fix: str = ""


def run_check(name: str, check: Callable[[], Check | Iterable[Check]]) -> list[Check]:
    """Calls a function that returns one or more checks; if it raises, returns a warning."""
    try:
        result = check()
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        return [Check(name, f"could not be checked: {type(error).__name__}: {reason}", WARNING)]
    return [result] if isinstance(result, Check) else list(result)


def read_output(argv: list[str], seconds: float) -> str | None:
    """Runs a program and returns its standard output; None if it does not end in time.

    Raises:
        OSError: it cannot be started.
        RuntimeError: it failed; the text is the last line that it printed.
    """
    process = start_program(argv)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_program(process)
        return None
    if process.returncode:
        lines = (err.strip() or out.strip() or f"exit status {process.returncode}").splitlines()
        raise RuntimeError(lines[-1])
    return out


def start_program(argv: list[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts a program in its own process group, with pipes for its output."""
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,
    )


def kill_program(process: subprocess.Popen[str]) -> None:
    """Kills a program and its children, and closes its pipes.

    A process that hangs inside the driver cannot be killed; it is left behind.
    """
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_S)

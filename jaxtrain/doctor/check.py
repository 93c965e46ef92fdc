"""What the doctor found of one thing, and how a probe is run so that it cannot end the others."""

import contextlib
import os
import signal
import subprocess
from typing import NamedTuple

KILLED_S = 1.0
OK, WARNING, PROBLEM = "ok", "warning", "problem"


class Check(NamedTuple):
    """One line of the screen.

    Args:
        name: of what was looked at, one word or two.
        value: what was found.
        state: OK, WARNING (training works, or this part is optional) or PROBLEM.
        fix: the command that fixes it, to be pasted; empty where there is nothing to fix.
    """

    name: str
    value: str
    state: str = OK
    fix: str = ""


def guarded(name: str, probe) -> list[Check]:
    """Returns a probe's checks; a probe that fails becomes a warning."""
    try:
        found = probe()
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        return [Check(name, f"could not be looked at: {type(error).__name__}: {why}", WARNING)]
    return [found] if isinstance(found, Check) else list(found)


def ask(argv: list[str], seconds: float) -> str | None:
    """Returns what a program prints; None where it does not answer in time.

    Raises:
        OSError: it cannot be started.
        RuntimeError: it failed; with its last line.
    """
    process = start(argv)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        return None
    if process.returncode:
        lines = (err.strip() or out.strip() or f"exit status {process.returncode}").splitlines()
        raise RuntimeError(lines[-1])
    return out


def start(argv: list[str], env: dict | None = None) -> subprocess.Popen:
    """Starts a program in a process group of its own, with pipes for what it prints."""
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


def kill(process) -> None:
    """Ends a process and those that it started, and closes its pipes.

    A process that hangs inside the driver cannot be killed: it is left behind.
    """
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_S)

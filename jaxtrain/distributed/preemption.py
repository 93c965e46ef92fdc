"""Stops a run on Ctrl-C, SIGTERM or SIGHUP: prints a line at once, saves after the step, and exits.

| signal | before the first step | during training | a second one |
|---|---|---|---|
| SIGTERM | exits with PREEMPTED | saves, exits with PREEMPTED | exits at once: 143 |
| SIGINT (Ctrl-C) | exits with INTERRUPTED | saves, exits with INTERRUPTED | exits at once: 130 |
| SIGHUP | exits with PREEMPTED | saves, exits with PREEMPTED | is ignored |

Python runs a signal handler only between two bytecodes of the main thread, so it would print
nothing while XLA compiles or the host waits for a step. But the interpreter also writes each
signal's number to a file descriptor at once (`signal.set_wakeup_fd`), which a thread reads here.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn, Self

from absl import logging

from jaxtrain.errors import INTERRUPTED, PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# `timeout` signals its child and then the child's process group, so the child gets two signals.
DUPLICATE_S = 0.05
HANGUP_S = 0.4  # longest wait for a terminal to be hung up after SIGHUP
PATIENCE_S = 0.5  # time in which the main thread must react before the delay is explained


class SignalListener:
    """Calls a function in a thread for each signal; a context manager that may be nested.

    Args:
        numbers: the signals to listen for.
        answer: called in the thread with the number, even while the main thread is in C++ code.
        handler: an ordinary handler, called in the main thread once that runs Python code again.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        answer: Callable[[int], None],
        handler: Callable[[int, FrameType | None], None],
    ):
        self._numbers, self._answer, self._handler = numbers, answer, handler
        self._depth, self._former = 0, {}

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth > 1:
            return self
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._former_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, self._handler) for number in self._numbers}
        self._thread = threading.Thread(target=self._listen, args=(reading,), daemon=True)
        self._thread.start()
        _LISTENERS.append(self)
        return self

    def __exit__(self, *exc):
        self._depth -= 1
        if self._depth:
            return
        _LISTENERS.remove(self)
        self._restore(self._former_fd)
        os.close(self._writing)
        self._thread.join()

    def _restore(self, wakeup_fd):
        for number, former in self._former.items():
            if former is not None:  # None: a handler that C code had installed
                signal.signal(number, former)
        signal.set_wakeup_fd(wakeup_fd)

    def _listen(self, reading):
        last, last_s = None, 0.0
        with open(reading, "rb", buffering=0) as numbers:
            while read := numbers.read(1):
                number, now_s = read[0], time.monotonic()
                duplicate = number == last and now_s - last_s < DUPLICATE_S
                if number in self._numbers and not duplicate:
                    last, last_s = number, now_s
                    self._answer(number)


_LISTENERS: list[SignalListener] = []  # that have been entered


def _forget_in_child() -> None:
    """Restores the former handlers in a forked child.

    The child shares the pipe with its parent, whose thread would answer the child's signals.
    """
    for listener in reversed(_LISTENERS):
        listener._restore(-1)
    _LISTENERS.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def end_now(status: int) -> NoReturn:
    """Exits at once: no other Python code runs, as after kill -9."""
    os._exit(status)


def exit_status_of(number: int) -> int:
    """Returns the exit status of a run that a signal has stopped without loss."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def end_at_signals() -> None:
    """Lets the next signal end this process at once: nothing is left that it must save."""
    if threading.current_thread() is threading.main_thread():  # Python refuses it elsewhere
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


class StopListener(SignalListener):
    """Receives the signal that stops a run.

    Before the first step there is nothing to save, and a signal ends the process at once. After
    `defer_signals`, the first signal is left to the training loop, which polls `agreed_signal`; a
    second signal ends the process at once.

    SIGHUP means that the terminal is gone, for instance because an ssh connection was lost. The
    kernel, the shell and the session manager may each send one, and a SIGTERM as well. So a SIGHUP
    never counts as the second signal, and the signal after a SIGHUP counts as the first. A process
    that was started with SIGHUP ignored, as by nohup, ignores it.

    With several processes, JAX's own SIGTERM handler agrees with the other processes on the step at
    which all stop, so a SIGTERM to any process stops the run. Ctrl-C and SIGHUP are forwarded to
    that handler as SIGTERM. As each process may get its own SIGTERM at any time, only a second
    Ctrl-C ends a process at once.

    Args:
        several: whether this is one of several processes.
    """

    def __init__(self, several: bool = False):
        numbers = [number for number in SIGNALS if not (several and number == signal.SIGTERM)]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        super().__init__(numbers, self._on_signal, lambda number, frame: None)
        self.signal: signal.Signals | None = None  # the signal to stop for
        self._several, self._forwarded = several, False
        self._activity, self._promise = "starting", ""
        self._calls = 0  # of agreed_signal

    def set_activity(self, activity: str) -> None:
        """Names what the process is doing before its first step; a signal prints it and exits."""
        self._activity, self._promise = activity, ""

    def defer_signals(self, promise: str) -> None:
        """Leaves the first signal to the training loop from now on.

        Args:
            promise: text of the line that is printed: "saving after this step, then stopping".
        """
        self._promise = promise

    def _on_signal(self, number: int) -> None:
        name, hangup = signal.Signals(number).name, number == signal.SIGHUP
        if hangup:
            _silence_lost_terminal()
        if hangup and (self.signal is not None or self._forwarded):
            return
        if self._several:
            self._forward(number, name)
        elif self.signal not in (None, signal.SIGHUP):
            end_now(128 + number)
        elif self._promise:
            self.signal = signal.Signals(number)
            hint = "" if hangup else " (again: end now without saving)"
            logging.warning("%s: %s%s", name, self._promise, hint)
        else:
            logging.warning(
                "%s while %s: ended before the first step; run the same command to start again",
                name,
                self._activity,
            )
            end_now(exit_status_of(number))

    def _forward(self, number: int, name: str) -> None:
        if self._forwarded or not _is_sigterm_handled_by_jax():
            end_now(128 + number)
        self._forwarded = True
        promise = self._promise or f"{self._activity}; all processes stop after their first step"
        logging.warning("%s: %s (again: end this process now)", name, promise)
        os.kill(os.getpid(), signal.SIGTERM)

    def agreed_signal(self) -> signal.Signals | None:
        """Returns the signal to stop for at this step, the same on every process, or None.

        Every process must call it equally often, because JAX counts the calls to agree on the one
        at which all stop. A call takes microseconds.
        """
        if not self._several or self.signal is not None:
            return self.signal
        from jax.experimental import multihost_utils

        self._calls += 1
        if multihost_utils.reached_preemption_sync_point(self._calls):
            self.signal = signal.SIGTERM
            logging.warning("SIGTERM to a process of this run: %s", self._promise)
        return self.signal


def _silence_lost_terminal() -> None:
    """Redirects output to /dev/null if the terminal is gone; otherwise a print would raise."""
    terminals, deadline_s = {1, 2}, time.monotonic() + HANGUP_S
    while terminals and time.monotonic() < deadline_s:
        for fd in tuple(terminals):
            try:
                os.write(fd, b"")  # on a lost terminal this fails as a print would
                if os.isatty(fd):
                    continue  # not hung up yet, or not at all: SIGHUP came from `kill`
            except OSError as error:
                if error.errno == errno.EIO:
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, fd)
                    os.close(null)
            terminals.discard(fd)
        time.sleep(0.01)


def _is_sigterm_handled_by_jax() -> bool:
    """Returns whether JAX has installed its SIGTERM handler, without importing JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt on Ctrl-C, and prints a line if compiled code delays that.

    A second Ctrl-C ends the process at once.
    """
    signalled, raised = threading.Event(), threading.Event()

    def explain_delay(number):
        if signalled.is_set():
            end_now(INTERRUPTED)
        signalled.set()
        if not raised.wait(PATIENCE_S):
            logging.warning("SIGINT: ending when the compiled code returns (again: end now)")

    def raise_interrupt(number, frame):
        raised.set()
        raise KeyboardInterrupt

    with SignalListener((signal.SIGINT,), explain_delay, raise_interrupt):
        yield

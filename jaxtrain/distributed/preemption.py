"""Stopping on request: Ctrl-C, SIGTERM and SIGHUP are answered at once, served between two steps.

Python runs a signal handler only between two bytecodes of the main thread: while XLA compiles or
the host waits for a step, it would answer nothing. The interpreter also writes the signal's number
to a file descriptor (`signal.set_wakeup_fd`), which a thread reads here.
"""

import contextlib
import errno
import os
import signal
import sys
import termios
import threading
import time

from absl import logging

from jaxtrain.errors import INTERRUPTED, PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DUPLICATE_S = 0.05  # `timeout` signals a process and then its group: two signals, one request
PATIENCE_S = 0.5  # that the main thread has to begin to end by itself


class SignalListener:
    """Calls `hear(number)` in a thread for each signal; a context manager that may be nested.

    Args:
        numbers: signals to listen to.
        hear: called in the thread, whatever the main thread does.
        handler: called in the main thread once it runs Python code again.
    """

    def __init__(self, numbers, hear, handler):
        self._numbers, self._hear, self._handler = numbers, hear, handler
        self._depth, self._former = 0, {}

    def __enter__(self):
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
            if former is not None:  # None: a handler that Python did not install
                signal.signal(number, former)
        signal.set_wakeup_fd(wakeup_fd)

    def _listen(self, reading):
        last, last_s = None, 0.0
        with open(reading, "rb", buffering=0) as numbers:
            while read := numbers.read(1):
                [number], now_s = read, time.monotonic()
                duplicate = number == last and now_s - last_s < DUPLICATE_S
                if number in self._numbers and not duplicate:
                    last, last_s = number, now_s
                    self._hear(number)


_LISTENERS = []  # those that are entered


def _forget_in_child():
    """Gives a forked child its parent's former handlers: it shares the descriptor's other end."""
    for listener in reversed(_LISTENERS):
        listener._restore(-1)
    _LISTENERS.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def end_now(status: int) -> None:
    """Ends the process without running another line of the main thread, as kill -9 would."""
    os._exit(status)


def exit_status_of(number) -> int:
    """Returns the exit status of a run that a signal stopped, with nothing lost."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


class StopListener(SignalListener):
    """The signal that asked a run to stop.

    Before the first step nothing is to be saved: a signal ends the process at once. From `serve`
    on, the first signal is for the training loop, and a second one ends the process at once.

    SIGHUP says that the terminal is gone, such as that of a lost ssh connection. The kernel, the
    shell and the session manager may each send it, beside a SIGTERM, so a SIGHUP never counts as
    the second signal, nor does the one that follows it. A process that was started with SIGHUP
    ignored (nohup) ignores it.

    With several processes JAX's own SIGTERM handler agrees on where all of them stop, so SIGTERM to
    any one stops the run. Ctrl-C and SIGHUP are passed on as SIGTERM. Each process of a job may get
    a SIGTERM of its own, however late, so there only a second Ctrl-C ends a process at once.

    Args:
        several: whether this is one of several processes.
    """

    def __init__(self, several: bool = False):
        numbers = [number for number in SIGNALS if not (several and number == signal.SIGTERM)]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        super().__init__(numbers, self._answer, self._ignore)
        self.signal = None  # what asked
        self._several, self._passed_on = several, False
        self._activity, self._promise = "starting", ""
        self._calls = 0  # of asked()

    def _ignore(self, number, frame):
        """The thread has answered."""

    def set_activity(self, activity: str) -> None:
        """Names what the process does before its first step, for the line that a signal prints."""
        self._activity, self._promise = activity, ""

    def defer_signals(self, promise: str) -> None:
        """From now on `asked` returns the signal; `promise` says what the first one brings about.

        Args:
            promise: such as "saving after this step, then stopping".
        """
        self._promise = promise

    def _answer(self, number):
        name, hangup = signal.Signals(number).name, number == signal.SIGHUP
        if hangup:
            _silence_lost_terminal()
        if hangup and (self.signal is not None or self._passed_on):
            return
        if self._several:
            self._pass_on(number, name)
        elif self.signal not in (None, signal.SIGHUP):
            end_now(128 + number)
        elif self._promise:
            self.signal = signal.Signals(number)
            again = "" if hangup else " (again: end now without saving)"
            logging.warning("%s: %s%s", name, self._promise, again)
        else:
            logging.warning(
                "%s while %s: ended before a step was made; the same command starts again",
                name,
                self._activity,
            )
            end_now(exit_status_of(number))

    def _pass_on(self, number, name):
        if self._passed_on or not _has_joined():
            end_now(128 + number)
        self._passed_on = True
        what = self._promise or f"{self._activity}; all processes stop after their first step"
        logging.warning("%s: %s (again: end this process now)", name, what)
        os.kill(os.getpid(), signal.SIGTERM)

    def agreed_signal(self):
        """Returns the signal to stop for, or None.

        Every process must call it equally often: where all of them stop is agreed on as a number of
        calls. A call costs microseconds.
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
    """Replaces output to a terminal that is gone by /dev/null: a failed write would end the run."""
    for fd in (1, 2):
        for _ in range(20):  # Linux sends the signal before it hangs the terminal up
            try:
                termios.tcgetattr(fd)
                time.sleep(0.01)
            except termios.error as error:
                if error.args[0] == errno.EIO:  # hung up; ENOTTY: a file or a pipe
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, fd)
                    os.close(null)
                break


def _has_joined() -> bool:
    """Whether JAX's SIGTERM handler is there; without it SIGTERM ends a process at once."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


@contextlib.contextmanager
def interruptible():
    """Raises KeyboardInterrupt on Ctrl-C, and prints a line where compiled code delays it.

    A second Ctrl-C ends the process at once.
    """
    asked, answered = threading.Event(), threading.Event()

    def hear(number):
        if asked.is_set():
            end_now(INTERRUPTED)
        asked.set()
        if not answered.wait(PATIENCE_S):
            logging.warning("SIGINT: ending when the compiled code returns (again: end now)")

    def handler(number, frame):
        answered.set()
        raise KeyboardInterrupt

    with SignalListener((signal.SIGINT,), hear, handler):
        yield

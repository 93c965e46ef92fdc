"""Stopping on request: a signal to one process is a save at the next step on all of them."""

import os
import signal

import jax
from absl import logging

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Holds the signal that asked the run to stop. A second Ctrl-C ends the process at once.

    With several processes JAX's own SIGTERM handler tells all of them which step to stop after, so
    SIGTERM to any one stops the run, and Ctrl-C is turned into it.
    """

    def __init__(self):
        self.signal = None
        self._former = {}

    def __enter__(self):
        several = jax.process_count() > 1
        for number in SIGNALS if not several else (signal.SIGINT,):
            self._former[number] = signal.signal(number, self._pass_on if several else self._ask)
        return self

    def __exit__(self, *exc):
        for number, former in self._former.items():
            signal.signal(number, former)

    def _ask(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        logging.warning("%s: saving at the next step; again ends at once.", self.signal.name)

    def _pass_on(self, number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int):
        """The signal to stop for after this step, or None; the same on every process."""
        if jax.process_count() == 1:
            return self.signal
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal

"""Signs of life for whoever started this process: how far it is, and its stacks when asked.

The launcher names a file in JAXTRAIN_BEAT and reads it from outside: JAX itself has no time limit
for a rank that lives and does nothing. SIGUSR1 writes the stacks of all threads to standard error.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time

PATH = "JAXTRAIN_BEAT"
BEAT_BYTES = 256  # each overwrites the last: on a disk that is full there is room for no other


class Heartbeat:
    """Writes {"beats", "step", "phase", "time", "step_s"}; without JAXTRAIN_BEAT it does nothing.

    Every rank makes the same beats in the same order, so the one with the fewest is the one that
    the others wait for. A beat costs 20 us.
    """

    def __init__(self):
        self._path = os.environ.get(PATH, "")
        self._said = {"beats": 0, "step": 0, "phase": "start", "step_s": 0.0}
        self._step_at = 0.0
        if self._path:
            faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)

    def __call__(self, phase: str, step: int | None = None) -> None:
        """phase: start, compile, train, eval, save or end; step: the newest that was begun."""
        if not self._path:
            return
        said, now = self._said, time.time()
        if phase == "train" and step != said["step"]:
            said["step_s"] = now - self._step_at if said["phase"] == "train" else said["step_s"]
            self._step_at = now
        said |= {"beats": said["beats"] + 1, "phase": phase, "time": now}
        said["step"] = said["step"] if step is None else step
        with contextlib.suppress(OSError):  # no training ends for want of a sign of life
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            with open(file, "wb") as beats:  # no fsync: worth nothing after a power cut
                beats.write(json.dumps(said).ljust(BEAT_BYTES).encode())


beat = Heartbeat()  # of this process

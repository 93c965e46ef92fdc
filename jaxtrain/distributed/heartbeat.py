"""Tells the launcher how far this process is, so that a hang is found and located.

A rank that hangs in a collective or in its data stays alive, and JAX sets no time limit for it. The
launcher therefore names a file in JAXTRAIN_BEAT, and watches from outside whether it changes. On
SIGUSR1 the process writes the stacks of all its threads to standard error.
"""

import contextlib
import faulthandler
import json
import os
import signal
import time

PATH = "JAXTRAIN_BEAT"
BEAT_BYTES = 256  # all beats have one size: on a full disk the file can be overwritten, not grow


class Heartbeat:
    """Writes {"beats", "step", "phase", "time", "step_s"} at each call; idle without JAXTRAIN_BEAT.

    Every rank makes the same beats in the same order, so the one with the fewest is the one that
    the others wait for. A beat costs 20 us.
    """

    def __init__(self):
        self._path = os.environ.get(PATH, "")
        self._record = {"beats": 0, "step": 0, "phase": "start", "step_s": 0.0}
        self._step_started_s = 0.0
        if self._path:
            faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # to stderr

    def __call__(self, phase: str, step: int | None = None) -> None:
        """Writes a beat.

        Args:
            phase: start, compile, train, eval, save or end.
            step: the newest that was begun; None if it is still the last one passed.
        """
        if not self._path:
            return
        record, now_s = self._record, time.time()
        if phase == "train" and step != record["step"]:
            if record["phase"] == "train":  # else the time since then is not that of a step
                record["step_s"] = now_s - self._step_started_s
            self._step_started_s = now_s
        record |= {"beats": record["beats"] + 1, "phase": phase, "time": now_s}
        if step is not None:
            record["step"] = step
        with contextlib.suppress(OSError):  # training goes on if the beat cannot be written
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            with open(file, "wb") as beats:  # no fsync: after a power cut nobody reads it
                beats.write(json.dumps(record).ljust(BEAT_BYTES).encode())


beat = Heartbeat()  # the one of this process

"""Writes a heartbeat file that shows the launcher how far this process is, and where it hangs.

A process that hangs in a collective or in data loading stays alive, and JAX has no time limit for
it. The launcher therefore sets JAXTRAIN_BEAT to the path of a file, and watches whether the file
changes. On SIGUSR1 the process writes the stacks of all its threads to standard error.
"""

import contextlib
import faulthandler
import json
import os
import signal
import time

PATH = "JAXTRAIN_BEAT"
BEAT_BYTES = 256  # a beat overwrites one of equal size, which works on a full disk too


class Heartbeat:
    """Writes {"beats", "step", "phase", "step_s"} when called; off without JAXTRAIN_BEAT.

    Every process makes the same beats in the same order, so the others wait for the one with the
    fewest. A beat takes 20 us.
    """

    def __init__(self):
        self._path = os.environ.get(PATH, "")
        self._record = {"beats": 0, "step": 0, "phase": "start", "step_s": 0.0}
        self._step_started_s = 0.0
        if self._path:
            faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # to stderr

    def describe_rank(self, ratios: dict[str, float], slow: list[str]) -> None:
        """Adds to the following beats how slow this process is, see jaxtrain.metrics.rank_watch.

        Args:
            ratios: {kind of work: own time over the median process's}.
            slow: those kinds in which this process is a straggler.
        """
        self._record |= {"ratios": ratios, "slow": slow}

    def describe_sites(self, text: str) -> None:
        """Adds to the following beats which sites are left out or waited for.

        Args:
            text: ASCII; "" if all take part. A beat contains as much of it as fits.
        """
        self._record["sites"] = text

    def scale_steps(self, factor: float) -> None:
        """Multiplies the step's time, for steps of another batch size, and writes a beat."""
        self._record["step_s"] *= factor
        self("train")

    def __call__(self, phase: str, step: int | None = None) -> None:
        """Writes a beat.

        Args:
            phase: start, compile, train, sites, eval, save or end.
            step: the newest step that has begun; None if that has not changed.
        """
        if not self._path:
            return
        record, now_s = self._record, time.monotonic()
        if phase == "train" and step != record["step"]:
            if record["phase"] == "train":  # otherwise other phases are included in that time
                record["step_s"] = now_s - self._step_started_s
            self._step_started_s = now_s
        record |= {"beats": record["beats"] + 1, "phase": phase}
        if step is not None:
            record["step"] = step
        content = json.dumps(record)
        if (excess := len(content) - BEAT_BYTES) > 0 and "sites" in record:
            content = json.dumps(record | {"sites": record["sites"][:-excess]})
        with contextlib.suppress(OSError):  # training goes on if the beat cannot be written
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            with open(file, "wb") as beats:  # no fsync: after a power cut nobody reads it
                beats.write(content.ljust(BEAT_BYTES).encode())


beat = Heartbeat()  # of this process

"""Runs the trainer, and kills its process once at the moment that /tmp/fault names.

outer      in the outer step, when the codes of all sites are here
recorded   when a round is in the ledger and not yet in the weights
save       while a checkpoint is being written
"""

import os
import runpy
import signal
from pathlib import Path

from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.sites import round as rounds
from jaxtrain.sites.round_log import RoundLog

FAULT = Path("/tmp/fault")


def kill_after(function, fault):
    """Returns a function that also kills this process if it is that fault's turn."""

    def run(*args, **values):
        result = function(*args, **values)
        if FAULT.exists() and FAULT.read_text().strip() == fault:
            FAULT.unlink()  # only once: the restarted process goes on
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return run


if __name__ == "__main__":
    rounds.outer_step = kill_after(rounds.outer_step, "outer")
    RoundLog.record = kill_after(RoundLog.record, "recorded")
    Checkpoints.save = kill_after(Checkpoints.save, "save")  # it writes in the background
    runpy.run_module("jaxtrain.train", run_name="__main__", alter_sys=True)

"""What a start asks of its run directory: that it is alone there, and whether work is left."""

import contextlib
import json
import uuid

import jax
from absl import logging

from jaxtrain.distributed.broadcast import broadcast_from_process_0, run_on_all_processes
from jaxtrain.run_directory.lock import RunLock
from jaxtrain.training.run import read_stored


@contextlib.contextmanager
def hold(cfg):
    """Locks cfg.workdir against other runs; to be entered before anything in it is touched.

    Process 0 takes the lock; where every host has a directory of its own, every process does.

    Raises:
        RunLocked: another run has locked it; with several processes a ValueError in each of them.
    """
    run, locks = None, jax.process_index() == 0
    if cfg.checkpoint.storage == "host0" and jax.process_count() > 1:
        run, locks = broadcast_from_process_0(lambda: uuid.uuid4().hex), True
    lock = RunLock(cfg.workdir, run=run)
    with contextlib.ExitStack() as stack:
        run_on_all_processes(lambda: stack.enter_context(lock) if locks else None)
        yield lock


def is_finished(workdir, steps: int, first: int) -> bool:
    """Whether a run at step `first` has saved and evaluated its last step and summed itself up.

    A summary.json or config.json that is damaged counts as missing: the run writes both again.
    """
    try:
        summary = json.loads((workdir / "summary.json").read_bytes())
        ended = summary["stopped_by"] is None and "eval/loss_nats" in summary
        if not (ended and first == steps == summary["step"]):
            return False
        read_stored(workdir)
    except FileNotFoundError:
        return False
    except (KeyError, TypeError, ValueError) as error:
        if first == steps:
            reason = error if isinstance(error, ValueError) else "a field is missing"
            logging.warning("%s is written again: %s", workdir / "summary.json", reason)
        return False
    return True

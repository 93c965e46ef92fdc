"""What a start asks of its run directory: that it is alone there, and whether work is left."""

import contextlib
import uuid

import jax

from jaxtrain.distributed.broadcast import from_process_0, on_all
from jaxtrain.run_directory.lock import RunLock


@contextlib.contextmanager
def lock_workdir(cfg):
    """Locks cfg.workdir against other runs; to be entered before anything in it is touched.

    Process 0 takes the lock; where every host has a directory of its own, every process does.

    Raises:
        RunLocked: another run has locked it; with several processes a ValueError in each of them.
    """
    run, locks = None, jax.process_index() == 0
    if cfg.checkpoint.storage == "host0" and jax.process_count() > 1:
        run, locks = from_process_0(lambda: uuid.uuid4().hex), True
    lock = RunLock(cfg.workdir, run=run)
    with contextlib.ExitStack() as stack:
        on_all(lambda: stack.enter_context(lock) if locks else None)
        yield lock

"""A folder that all processes share: each writes and reads its own parts of every array.

Orbax writes, in the background. TensorStore reads: Orbax's own restore holds 0.5 to 0.9 of a second
copy of the state, and after an unreadable leaf its other reads land in an event loop that it has
closed.
"""

import logging as std_logging
import os
import shutil
import sys
import uuid
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging

from jaxtrain.checkpoint.zarr import open_stored, why
from jaxtrain.distributed.broadcast import broadcast_from_process_0, gather_first_error
from jaxtrain.errors import CheckpointError
from jaxtrain.file_errors import describe_storage_error


class SharedStore:
    """Steps' arrays in `folder`. Makes Orbax's manager with the first save."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int):
        quiet_orbax()
        self._folder, self._keep = folder, (keep_last, keep_every)
        self._manager = None  # made by the first save, after restore has moved what is broken
        self._checked = jax.process_count() == 1

    def check(self) -> None:
        """Raises ValueError unless all processes see one folder. Once, before anything is lost."""
        if self._checked:
            return
        nonce = (
            self._folder.parent / f".shared-{broadcast_from_process_0(lambda: uuid.uuid4().hex)}"
        )

        def write():
            nonce.parent.mkdir(parents=True, exist_ok=True)
            nonce.touch()

        broadcast_from_process_0(write)
        seen = nonce.exists()
        reason = gather_first_error(
            "" if seen else f"does not see what process 0 wrote in {nonce.parent}"
        )
        broadcast_from_process_0(lambda: nonce.unlink())
        if reason:
            raise ValueError(
                f"checkpoint.storage=shared needs a folder that all processes share; {reason}. Set "
                "--checkpoint.storage=host0, or a --workdir on a shared disk."
            )
        self._checked = True

    def newest(self) -> int | None:
        return self._open().latest_step()

    def _open(self):
        if self._manager is None:
            quiet_closed_loops()
            self._manager = _open_manager(self._folder, *self._keep)
        return self._manager

    def save(self, step: int, leaves: dict, record: dict) -> None:
        """Starts to save; raises what failed in the save before this one."""
        items = {"state": ocp.args.PyTreeSave(leaves), "record": ocp.args.JsonSave(record)}
        self._open().save(step, args=ocp.args.Composite(**items), force=True)

    def is_saving(self) -> bool:
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()

    def reload(self) -> None:
        if self._manager is not None:
            self._manager.reload()  # it caches what it has seen, and would refuse moved steps

    def discard(self, step: int) -> None:
        """Removes what a failed save of this step has written, as far as that can be done."""
        self._manager = None  # it would raise the same error again
        if jax.process_index() == 0:
            for unfinished in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def read(self, folder: Path, template: dict) -> dict:
        """Every leaf, where the template wants it.

        Raises:
            CheckpointError: in all processes or none.
        """
        arrays, reading, reason = {}, {}, ""
        paths = list(template)
        for i, path in enumerate(paths):
            try:
                for name in paths[i : i + 2]:  # the next one is read while this one is placed
                    if name not in reading:
                        reading[name] = start_reading(folder / "state", name, template[name])
                name, leaf, shards = path, template[path], reading.pop(path)
                read = lambda index, shards=shards: shards[str(index)].result()
                array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
                arrays[path] = jax.block_until_ready(array)
            except Exception as error:  # whatever it is, the other processes must hear of it
                reason = f"{name} cannot be read: {why(error)}"
                break
        reason = gather_first_error(reason)
        if reason:
            raise CheckpointError(reason)
        return arrays


def start_reading(folder: Path, path: str, leaf) -> dict:
    """Futures of the parts of a leaf that this process's devices hold, by index."""
    stored = open_stored(folder, path, leaf)
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    parts = {str(index): index for index in indices}  # copies on several devices are read once
    return {key: stored[index].read() for key, index in parts.items()}


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, without its own decision to save before a preemption.

    jaxtrain.distributed.preemption decides that.

    Orbax asks once more while it commits, to log the time since the step before; of a step that
    an earlier start has saved it holds no comparable time (lightweight_initialize), and raises.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def _open_manager(folder: Path, keep_last: int, keep_every: int) -> ocp.CheckpointManager:
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)  # floats: 8 % smaller, 2x slower,
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()  # and a copy of the state in memory
    registry.add("state", ocp.args.PyTreeSave, handler)
    registry.add("record", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep_last,
        keep_period=keep_every or None,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
    )
    return _Manager(folder, options=options, handler_registry=registry)


def quiet_orbax() -> None:
    """Drops from the log Orbax's lines below warnings, and what the file system refuses.

    Orbax also raises the latter. A full disk is logged four times by it and once for each array by
    asyncio, with 100 lines of traceback; -v=1 shows them.
    """
    for name in ("absl", "asyncio"):
        logger = std_logging.getLogger(name)
        if _is_not_chatter not in logger.filters:
            logger.addFilter(_is_not_chatter)


def _is_not_chatter(record) -> bool:
    orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    if (orbax or record.name == "asyncio") and record.exc_info:
        return logging.level_debug() or not describe_storage_error(record.exc_info[1], "")
    return not orbax or record.levelno >= std_logging.WARNING


def quiet_closed_loops() -> None:
    """Prints nothing where an array's write ends after Orbax has closed the event loop it was in.

    One write that fails closes the loop; TensorStore's threads then print a traceback for every
    other write that ends, which is no error of its own. -v=1 shows them.
    """
    former = sys.unraisablehook
    if getattr(former, "of", None) is quiet_closed_loops:
        return

    def hook(raised):
        closed = raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"
        if not closed or raised.object is not None or logging.level_debug():
            former(raised)

    hook.of = quiet_closed_loops
    sys.unraisablehook = hook

"""Stores checkpoints in a folder that all processes share: each writes its own parts of arrays.

Orbax writes, in the background. We read with TensorStore: Orbax's own restore needs memory for
0.5 to 0.9 of a second state, and after an unreadable leaf it closes the event loop while other
reads still run in it.
"""

import logging as std_logging
import os
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from jaxtrain.checkpoint.zarr import open_stored, shorten_error
from jaxtrain.distributed.broadcast import broadcast_from_process_0, gather_first_error
from jaxtrain.errors import CheckpointError
from jaxtrain.file_errors import describe_storage_error

POLL_S = 0.01


class SharedStore:
    """The arrays of each step in `folder`, written by Orbax."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int):
        quiet_orbax()
        self._folder, self._keep = folder, (keep_last, keep_every)
        # Created late: it lists the folder at once, and restore may move damaged steps before that.
        self._manager: _Manager | None = None
        self._failures: list[Exception] = []  # of writes of this process
        self._checked = jax.process_count() == 1

    def check(self) -> None:
        """Raises ValueError unless all processes see the same folder. Checks only once."""
        if self._checked:
            return
        nonce = (
            self._folder.parent / f".shared-{broadcast_from_process_0(lambda: uuid.uuid4().hex)}"
        )

        def write_nonce():
            nonce.parent.mkdir(parents=True, exist_ok=True)
            nonce.touch()

        broadcast_from_process_0(write_nonce)
        seen = nonce.exists()
        error = "" if seen else f"does not see what process 0 wrote in {nonce.parent}"
        reason = gather_first_error(error)
        broadcast_from_process_0(lambda: nonce.unlink())
        if reason:
            raise ValueError(
                f"checkpoint.storage=shared needs a folder that all processes share; {reason}. Set "
                "--checkpoint.storage=host0, or a --workdir on a shared disk."
            )
        self._checked = True

    def newest(self) -> int | None:
        """Returns the newest stored step."""
        return self._open().latest_step()

    def _open(self) -> "_Manager":
        if self._manager is None:
            quiet_closed_loops()
            self._failures = []
            self._manager = _open_manager(self._folder, *self._keep, self._failures)
        return self._manager

    def save(self, step: int, leaves: dict[str, jax.Array], record: dict[str, Any]) -> None:
        """Starts to save in the background. Raises the error of the save before this one, if any.

        Orbax copies the arrays off the device before it returns, so they may be donated. It writes
        to `STEP.orbax-checkpoint-tmp` and renames that folder when every process has finished.
        """
        items = {"state": ocp.args.PyTreeSave(leaves), "record": ocp.args.JsonSave(record)}
        self._open().save(step, args=ocp.args.Composite(**items), force=True)

    def is_saving(self) -> bool:
        """Returns whether a save is running."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Blocks until the last save is on disk, or raises its error.

        A process that could not write raises at once. Orbax would first wait for the others, and
        these for it, for ten minutes.
        """
        if self._manager is not None:
            while self._manager.is_saving_in_progress():
                if self._failures:
                    raise self._failures[0]
                time.sleep(POLL_S)
            self._manager.wait_until_finished()

    def reload(self) -> None:
        """Makes Orbax list the folder again: it would refuse to save a step that was moved away."""
        if self._manager is not None:
            self._manager.reload()

    def discard(self, step: int) -> None:
        """Removes what a failed save of this step has written, if the file system lets it."""
        self._manager = None  # it would raise the same error again
        if jax.process_index() == 0:
            for unfinished in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def close(self) -> None:
        """Waits for the last save and stops Orbax's threads."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def read(self, folder: Path, template: dict[str, Any]) -> dict[str, jax.Array]:
        """Reads every leaf of a step's folder, with the template's shardings.

        Raises:
            CheckpointError: a leaf cannot be read; raised in every process.
        """
        arrays, reading, reason, paths = {}, {}, "", list(template)
        for i, path in enumerate(paths):
            try:
                for name in paths[i : i + 2]:  # the next leaf is read while this one is placed
                    if name not in reading:
                        reading[name] = start_reading(folder / "state", name, template[name])
                name, leaf, shards = path, template[path], reading.pop(path)
                read = lambda index, shards=shards: shards[str(index)].result()
                array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
                arrays[path] = jax.block_until_ready(array)
            except Exception as error:  # whatever it is: the other processes wait for us below
                reason = f"{name} cannot be read: {shorten_error(error)}"
                break
        reason = gather_first_error(reason)
        if reason:
            raise CheckpointError(reason)
        return arrays


def start_reading(folder: Path, path: str, leaf: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Returns futures of the parts of a leaf that this process's devices need, by index."""
    stored = open_stored(folder, path, leaf)
    assert leaf.sharding is not None  # restore() checks
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    parts = {str(index): index for index in indices}  # a part on several devices is read once
    return {key: stored[index].read() for key, index in parts.items()}


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its check for preemption: jaxtrain.distributed.preemption has ours.

    Orbax also runs its check during a commit, to log the time since the previous step. If an
    earlier start saved that step, the time is unknown (lightweight_initialize) and it raises.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _Write:
    """A write in the background, which notes its error in a list."""

    def __init__(self, future: Any, failures: list[Exception]):
        self._future, self._failures = future, failures

    def result(self, timeout: int | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._failures.append(error)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._future, name)


class _NotesFailures(ocp.AsyncCheckpointHandler):
    """A base of a handler: notes the errors of this process's writes in `failures`."""

    failures: list[Exception]

    async def async_save(self, *args: Any, **values: Any) -> list[Any]:
        futures = await super().async_save(*args, **values) or []  # the handler's own
        return [_Write(future, self.failures) for future in futures]


class _ArraysHandler(_NotesFailures, ocp.PyTreeCheckpointHandler):
    """Writes the arrays."""


class _RecordHandler(_NotesFailures, ocp.JsonCheckpointHandler):
    """Writes the record."""


def _open_manager(
    folder: Path, keep_last: int, keep_every: int, failures: list[Exception]
) -> _Manager:
    # Compression makes float arrays 8 % smaller, but needs twice the time and a copy of the state.
    arrays, record = _ArraysHandler(use_compression=False), _RecordHandler()
    arrays.failures = record.failures = failures
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, arrays)
    registry.add("record", ocp.args.JsonSave, record)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep_last,
        keep_period=keep_every or None,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
    )
    return _Manager(folder, options=options, handler_registry=registry)


def quiet_orbax() -> None:
    """Hides Orbax's log lines below warnings, and its tracebacks of file-system errors.

    No error is lost, because Orbax also raises it. For a full disk Orbax logs four tracebacks of
    100 lines, and asyncio one for each array; -v=1 shows them.
    """
    for name in ("absl", "asyncio"):
        logger = std_logging.getLogger(name)
        if _is_worth_logging not in logger.filters:
            logger.addFilter(_is_worth_logging)


def _is_worth_logging(record: std_logging.LogRecord) -> bool:
    orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    if (orbax or record.name == "asyncio") and record.exc_info:
        error = record.exc_info[1]
        return logging.level_debug() or error is None or not describe_storage_error(error, "")
    return not orbax or record.levelno >= std_logging.WARNING


def quiet_closed_loops() -> None:
    """Hides the tracebacks of array writes that end after Orbax has closed their event loop.

    The first write that fails makes Orbax close the loop. TensorStore's threads then print a
    traceback for every other write, though nothing else failed; -v=1 shows them.
    """
    previous_hook = sys.unraisablehook
    if getattr(previous_hook, "__name__", "") == "hide_closed_loop":  # installed already
        return

    def hide_closed_loop(raised):
        closed = raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"
        if not closed or raised.object is not None or logging.level_debug():
            previous_hook(raised)

    sys.unraisablehook = hide_closed_loop

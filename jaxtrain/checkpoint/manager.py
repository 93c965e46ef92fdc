"""Saves a run's state, one folder per step, and verifies it when it is restored.

    <folder>/<step>/state/            the arrays, by path: zarr in OCDBT, as Orbax writes them
    <folder>/<step>/record/metadata   JSON: format, step, meta, and each leaf's dtype, shape, digest

Orbax guarantees that a step's folder appears under its final name only once it is complete, and
that saving in the background works on a copy, so that the state may be donated. But it restores a
flipped byte, casts a dtype, and takes an empty folder for the newest step, all without an error. So
our record describes every leaf, and a step that differs from its record is not restored.
"""

import contextlib
import operator
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from jaxtrain.checkpoint import integrity
from jaxtrain.checkpoint.step_folders import list_steps, set_aside
from jaxtrain.checkpoint.storage import open_storage
from jaxtrain.checkpoint.zarr import check_path
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.errors import CheckpointError, SaveFailed
from jaxtrain.file_errors import describe_error, describe_storage_error, is_file_error

READ_ATTEMPTS = 5  # if the running training deletes each step before it is read


class _StepDeleted(CheckpointError):
    """The running training deleted a step while it was read; there is a newer one."""


class Restored(NamedTuple):
    """A restored checkpoint."""

    step: int
    state: Any
    meta: dict


class Checkpoints:
    """The checkpoints of one run, as a context manager; leaving it waits for the last save.

    Args:
        folder: shared by all processes, or process 0's own; created by the first save.
        keep_last: number of newest steps that are not deleted, at least 1.
        keep_every: multiples of this step are not deleted either; 0 is none.
        read_only: never writes, moves or cleans up; for folders that a running training writes to.
        storage: "shared" if all processes write to `folder`, "host0" if it is process 0's own.
        before_save: called by process 0 before each save; if it raises, nothing is saved.

    Attributes:
        rejected: (step, reason) of every step that `restore` found damaged.

    Raises:
        ValueError: keep_last, keep_every or storage is not one of the values above.
    """

    def __init__(
        self,
        folder: Path | str,
        keep_last: int,
        keep_every: int = 0,
        read_only: bool = False,
        storage: str = "shared",
        before_save: Callable[[], None] = lambda: None,
    ):
        self.folder = Path(folder).absolute()
        check_path(self.folder)
        self.rejected: list[tuple[int, str]] = []
        self._read_only, self._before_save = read_only, before_save
        self._saving: int | None = None  # step of the last save, which may still be running
        self.storage = open_storage(storage, self.folder, keep_last, keep_every)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            # If a file-system error ends the run anyway, the failed save has the same cause.
            if not (isinstance(failure, SaveFailed) and _is_disk_error(error)):
                logging.error("The last checkpoint was not saved: %s", failure)
        finally:
            self.storage.close()

    def steps(self) -> list[int]:
        """Returns the steps on disk, oldest first, damaged ones included."""
        return list_steps(self.folder)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> float:
        """Starts to save in the background; returns the seconds that it blocked.

        Once it returns, the state may be donated.

        Args:
            step: above every stored step.
            state: pytree of jax arrays; typed PRNG keys as their key_data.
            meta: JSON-able; `restore` returns it as JSON does (tuples as lists).

        Raises:
            ValueError: the step is not new, the state or meta cannot be stored, or read_only is
                set.
            SaveFailed: the file system refused this save, or the one before it.
            Exception: before_save raised it, or the save before this one did.
        """
        start = time.perf_counter()
        if self._read_only:
            raise ValueError("save needs Checkpoints(..., read_only=False); got read_only=True.")
        step, leaves = operator.index(step), integrity.flatten_state(state)
        record = integrity.build_record(step, leaves, meta)
        broadcast_from_process_0(self._before_save)
        self.wait()
        with self._remove_unfinished_on_error(step):
            self.storage.check()
            newest = self.storage.newest()
        if newest is not None and step <= newest:
            raise ValueError(
                f"a checkpoint's step must be above the newest one's, {newest}; got step={step} in "
                f"{self.folder}. Resume from it, or use another folder (--workdir)."
            )
        self._saving = step
        with self._remove_unfinished_on_error(step, BaseException):  # on Ctrl-C too
            self.storage.save(step, leaves, record)
        return time.perf_counter() - start

    @contextlib.contextmanager
    def _remove_unfinished_on_error(
        self, step: int | None, kind: type[BaseException] = Exception
    ) -> Iterator[None]:
        """Removes the unfinished step, and turns errors of the file system into SaveFailed."""
        try:
            yield
        except kind as error:
            reason = describe_storage_error(error, self.folder)
            if step is not None:
                # Its files may be what fills the disk, and Orbax would call it running for ever.
                self.storage.discard(step)
            if reason is None or isinstance(error, SaveFailed):
                raise
            raise SaveFailed(f"checkpoint {step} was not saved: {reason}") from error

    def is_saving(self) -> bool:
        """Returns whether a save is running in the background."""
        return self.storage.is_saving()

    def wait(self) -> None:
        """Blocks until the last save is on disk. Raises its error if it failed."""
        with self._remove_unfinished_on_error(self._saving):
            self.storage.wait()

    def restore(
        self, abstract_state: Any, device_check: bool = True, step: int | None = None
    ) -> Restored | None:
        """Restores the newest intact step; returns None if no step is stored.

        Damaged steps are skipped with a warning, and moved to `checkpoints_rejected` beside the
        folder once an older one has been restored. Every process must call it.

        With read_only, a step deleted while it is read is not rejected: a newer one is read.

        Args:
            abstract_state: the state itself, or a pytree of jax.ShapeDtypeStruct with shardings,
                on any mesh. Only types, shapes and shardings are used.
            device_check: computes the digests of the restored arrays and compares them.
            step: the only step to try; None takes the newest intact one.

        Raises:
            ValueError: the newest intact step is of another state, or of a newer format; `step` is
                not stored; or abstract_state has no shardings.
            CheckpointError: steps are stored, but all are damaged.
        """
        template = integrity.flatten_state(abstract_state)
        unplaced = [path for path, leaf in template.items() if leaf.sharding is None]
        if unplaced:
            raise ValueError(
                f"abstract_state must have shardings; got none for {', '.join(unplaced[:3])}. Pass "
                "the state itself, or jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) "
                "for each of its arrays x."
            )
        if not self._read_only:
            self.storage.check()
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(_StepDeleted):
                return self._restore(abstract_state, template, device_check, step)
        raise CheckpointError(
            f"a checkpoint must exist while it is read; the run that writes to {self.folder} "
            f"deleted {READ_ATTEMPTS}. Wait for its end, or let it keep more (--keep_last)."
        )

    def _restore(
        self, abstract_state: Any, template: dict[str, Any], device_check: bool, step: int | None
    ) -> Restored | None:
        """Restores as restore() does; raises _StepDeleted if the run deleted the step."""
        rejected, listed = [], broadcast_from_process_0(self.steps)
        if step is not None and step not in listed:
            raise ValueError(f"step must be one of {listed}; got {step}. Set --step.")
        candidates = listed if step is None else [step]
        for step in reversed(candidates):
            folder = self.folder / str(step)
            arrays = None  # frees the arrays of a rejected step before the next is read
            try:
                record = broadcast_from_process_0(
                    lambda folder=folder: integrity.read_record(folder)
                )
                integrity.check_format(record)
                integrity.check_template(record, template)
                arrays = self.storage.read(folder, template)
                if device_check:
                    integrity.check_digests(record, arrays)
            except CheckpointError as error:
                if self._read_only and broadcast_from_process_0(self.steps) != listed:
                    raise _StepDeleted from error
                rejected.append((step, str(error)))
                if jax.process_index() == 0:
                    logging.warning("Checkpoint at step %d rejected: %s", step, error)
                continue
            finally:
                self.rejected = rejected
            if rejected and not self._read_only:
                self._set_aside([step for step, _ in rejected])
            leaves = [arrays[path] for path in template]
            state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
            return Restored(step, state, record["meta"])
        if rejected:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in rejected)
            raise CheckpointError(
                f"{self.folder} contains no intact checkpoint: {reasons}. Nothing was moved. "
                "Restore a good step from a backup, or use another folder (--workdir)."
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        broadcast_from_process_0(lambda: set_aside(self.folder, steps))
        self.storage.reload()

    def read_meta(self, step: int | None = None) -> dict[str, Any] | None:
        """Returns the meta of a step, or of the newest with an intact record; None if none exists.

        Reads no arrays and does not communicate with other processes.

        Raises:
            ValueError: a newer version of this program wrote it.
            CheckpointError: the record of that step, or of every step, is damaged.
        """
        steps = self.steps() if step is None else [step]
        reasons = ""
        for candidate in reversed(steps):
            try:
                record = integrity.read_record(self.folder / str(candidate))
            except CheckpointError as error:
                reasons += f"; step {candidate}: {error}"
                continue
            integrity.check_format(record)
            return record["meta"]
        if reasons:
            raise CheckpointError(f"{self.folder} contains no readable record{reasons}")
        return None

    @contextlib.contextmanager
    def add_newest_step_to_errors(self) -> Iterator[None]:
        """Adds the newest step on disk to errors of the file system within the block.

        Raises:
            SaveFailed: a checkpoint or another file of the run cannot be written.
        """
        try:
            yield
        except (SaveFailed, OSError) as error:
            if not _is_disk_error(error):
                raise
            try:
                self.wait()  # the running save may become the newest step
            except SaveFailed as failed:  # the save has filled the disk, not the log line
                error = failed
            steps = self.steps()
            newest = f"the newest checkpoint is step {steps[-1]}" if steps else "no step is saved"
            reason = str(error) if isinstance(error, SaveFailed) else describe_error(error)
            raise SaveFailed(
                f"{reason}; {newest} in {self.folder}. Free some space or repair the named file, "
                "then run the same command again."
            ) from error


def _is_disk_error(error: BaseException) -> bool:
    """Returns whether the file system caused an error, rather than bad input or a bug."""
    return isinstance(error, SaveFailed) or is_file_error(error)

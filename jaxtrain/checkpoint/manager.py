"""Checkpoints: a state and its record in one atomic folder per step, verified when read back.

    <folder>/<step>/state/            the arrays, by path: zarr in OCDBT, as Orbax writes them
    <folder>/<step>/record/metadata   JSON: format, step, meta, and each leaf's dtype, shape, digest

Orbax restores a flipped byte, casts a dtype and takes an empty folder for the newest step without
a word, so the record says what every leaf must be, and a step that differs is not restored.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from jaxtrain.checkpoint import integrity as digest
from jaxtrain.checkpoint.process0_store import Process0Store
from jaxtrain.checkpoint.shared_store import SharedStore
from jaxtrain.distributed.broadcast import broadcast_from_process_0
from jaxtrain.errors import CheckpointError, SaveFailed
from jaxtrain.file_errors import describe_error, describe_storage_error, is_file_error

STORAGE = {"shared": SharedStore, "host0": Process0Store}
TRIES = 5  # to read a step before the run that is going on replaces it


class _Replaced(CheckpointError):
    """A step was removed while it was read; there is a newer one."""


class Restored(NamedTuple):
    step: int
    state: Any
    meta: dict


class Checkpoints:
    """The checkpoints of one run. Use it as a context manager: leaving waits for the last save.

    Args:
        folder: shared by all processes, or process 0's own; made by the first save.
        keep_last: this many of the newest steps are kept.
        keep_every: steps that are multiples of it are kept too; 0 keeps no more.
        read_only: never writes, moves or cleans up, as beside a run that is still going.
        storage: a key of STORAGE.
        before_save: called by process 0 before each save; an error of it prevents the save.

    Attributes:
        rejected: (step, reason) of every step that `restore` would not take.
    """

    def __init__(
        self,
        folder,
        keep_last: int,
        keep_every=0,
        read_only=False,
        storage="shared",
        before_save=lambda: None,
    ):
        assert keep_last >= 1 and keep_every >= 0, (keep_last, keep_every)  # TrainConfig checks
        self.folder = Path(folder).absolute()
        self.rejected: list[tuple[int, str]] = []
        self._read_only, self._before_save = read_only, before_save
        self._saving: int | None = None  # step of the last save, which may be under way
        self.storage = STORAGE[storage](self.folder, keep_last, keep_every)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            if not (isinstance(failure, SaveFailed) and is_of_disk(error)):  # the same twice
                logging.error("The last checkpoint was not saved: %s", failure)
        finally:
            self.storage.close()

    def steps(self) -> list[int]:
        """Steps on disk, oldest first, good or not."""
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def save(self, step: int, state, meta: dict) -> float:
        """Saves in the background; returns the seconds it blocked. Then the state may be donated.

        Args:
            step: above every step that is stored.
            state: pytree of jax arrays; typed PRNG keys as their key_data.
            meta: JSON-able; comes back from `restore` as JSON gives it (tuples as lists).

        Raises:
            ValueError: the step is not new, a leaf is no array or two share a path, or read_only.
            SaveFailed: the file system refused this save, or the one before it.
            Exception: what before_save raised, or else failed in the save before this one.
        """
        start = time.perf_counter()
        if self._read_only:
            raise ValueError("save needs Checkpoints(..., read_only=False); got read_only=True.")
        leaves = digest.flatten_state(state)
        record = digest.build_record(step, leaves, meta)
        broadcast_from_process_0(self._before_save)
        self.wait()
        with self._naming(step):
            self.storage.check()
            newest = self.storage.newest()
        if newest is not None and step <= newest:
            raise ValueError(
                f"a checkpoint's step must be above the newest one's, {newest}; got step={step} in "
                f"{self.folder}. Resume from it, or set another --workdir."
            )
        self._saving = step
        with self._naming(step):
            self.storage.save(step, leaves, record)
        return time.perf_counter() - start

    @contextlib.contextmanager
    def _naming(self, step: int):
        """Turns what the file system refuses into a SaveFailed, and removes the unfinished step."""
        try:
            yield
        except Exception as error:
            reason = describe_storage_error(error, self.folder)
            if reason is None and not isinstance(error, SaveFailed):
                raise
            self.storage.discard(step)  # it may be all that fills the disk
            if isinstance(error, SaveFailed):
                raise
            raise SaveFailed(f"checkpoint {step} was not saved: {reason}") from error

    def is_saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self.storage.is_saving()

    def wait(self) -> None:
        """Blocks until the last save is on disk. Raises what failed in the background, if any."""
        with self._naming(self._saving):
            self.storage.wait()

    def restore(self, abstract_state, device_check=True, step=None) -> Restored | None:
        """The newest step that is what was saved, or None where no step is stored.

        Steps that are not are passed over with a warning, and moved to `checkpoints_rejected`
        beside the folder once an older one has been restored. Call it in every process.

        Args:
            abstract_state: pytree of jax.ShapeDtypeStruct with shardings, on any mesh.
            device_check: compares the digests of what was read, on the devices.
            step: only this one; None takes the newest good one.

        With read_only, a step that the run beside it removes meanwhile is not rejected: the newer
        one is read.

        Raises:
            ValueError: the newest intact step is of another state, or of a newer format; or `step`
                is not stored.
            CheckpointError: steps are stored, and none can be trusted.
        """
        template = digest.flatten_state(abstract_state)
        unplaced = [path for path, leaf in template.items() if leaf.sharding is None]
        if unplaced:
            raise ValueError(f"abstract_state must hold shardings; got none for {unplaced}.")
        if not self._read_only:
            self.storage.check()
        for _ in range(TRIES):
            with contextlib.suppress(_Replaced):
                return self._restore(abstract_state, template, device_check, step)
        raise CheckpointError(
            f"a checkpoint must stay while it is read; the run that writes to {self.folder} "
            f"replaced {TRIES}. Wait for its end, or train with a larger --keep_last."
        )

    def _restore(self, abstract_state, template, device_check, step) -> Restored | None:
        """As restore(); raises _Replaced if what it read was removed."""
        rejected, steps = [], broadcast_from_process_0(self.steps)
        listed = steps
        if step is not None:
            if step not in steps:
                raise ValueError(f"step must be one of {steps}; got {step}. Set --step.")
            steps = [step]
        for step in reversed(steps):
            folder, arrays = self.folder / str(step), None  # frees a rejected step's before reading
            try:
                record = broadcast_from_process_0(lambda folder=folder: digest.read_record(folder))
                digest.check_format(record)
                digest.check_template(record, template)
                arrays = self.storage.read(folder, template)
                if device_check:
                    digest.check_digests(record, arrays)
            except CheckpointError as error:
                if self._read_only and broadcast_from_process_0(self.steps) != listed:
                    raise _Replaced from error
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
                f"{self.folder} holds no checkpoint that can be trusted: {reasons}. Nothing was "
                "moved. Put back a good step, or set another --workdir."
            )
        return None

    def read_meta(self, step: int | None = None) -> dict | None:
        """The meta of a step, or of the newest with an intact record; None where none is stored.

        Reads no arrays and talks to no other process.

        Raises:
            ValueError: its format is newer than this program.
            CheckpointError: the record of that step, or of every step, is broken.
        """
        steps = self.steps() if step is None else [step]
        reasons = ""
        for candidate in reversed(steps):
            try:
                record = digest.read_record(self.folder / str(candidate))
            except CheckpointError as error:
                reasons += f"; step {candidate}: {error}"
                continue
            digest.check_format(record)
            return record["meta"]
        if reasons:
            raise CheckpointError(f"{self.folder} holds no readable record{reasons}")
        return None

    @contextlib.contextmanager
    def naming_newest(self):
        """Adds the newest step on disk to what the file system refuses in the block.

        Raises:
            SaveFailed: a checkpoint or another file of the run cannot be written.
        """
        try:
            yield
        except (SaveFailed, OSError) as error:
            if not is_of_disk(error):
                raise
            try:
                self.wait()  # the save under way may become the newest
            except SaveFailed as failed:  # it, rather than a line of a log, has filled the disk
                error = failed
            steps = self.steps()
            newest = f"the newest checkpoint is step {steps[-1]}" if steps else "no step is saved"
            reason = str(error) if isinstance(error, SaveFailed) else describe_error(error)
            raise SaveFailed(
                f"{reason}; {newest} in {self.folder}. Free some space or mend what is named, then "
                "run the same command again."
            ) from error

    def _set_aside(self, steps: list[int]) -> None:
        """Moves these steps' folders out of the way, over nothing that is there already."""
        aside = self.folder.parent / "checkpoints_rejected"

        def move():
            aside.mkdir(exist_ok=True)
            for step in steps:
                names = [str(step)] + [f"{step}.{k}" for k in range(1, 1_000)]
                free = next(name for name in names if not (aside / name).exists())
                os.rename(self.folder / str(step), aside / free)

        broadcast_from_process_0(move)
        self.storage.reload()


def is_of_disk(error: BaseException) -> bool:
    """Whether the file system is why something ends, rather than its input or a fault of ours."""
    return isinstance(error, SaveFailed) or is_file_error(error)

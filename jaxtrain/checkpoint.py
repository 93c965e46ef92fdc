"""Checkpoints: a state and its record in one atomic folder per step, verified when read back.

    <folder>/<step>/state/            the arrays, by path, written by Orbax
    <folder>/<step>/record/metadata   JSON: format, step, meta, and each leaf's dtype, shape, digest

Orbax restores a flipped byte, casts a dtype and takes an empty folder for the newest step without
a word, so the record says what every leaf must be, and a step that differs is not restored.
"""

import json
import logging as std_logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from jax.experimental import multihost_utils

from jaxtrain import digest
from jaxtrain.digest import CheckpointError

REASON_BYTES = 512  # of a reason that one process tells the others


class Restored(NamedTuple):
    step: int
    state: Any
    meta: dict


class Checkpoints:
    """The checkpoints of one run. Use it as a context manager: leaving waits for the last save.

    Args:
        folder: shared by all processes; made by the first save.
        keep_last: this many of the newest steps are kept.
        keep_every: steps that are multiples of it are kept too; 0 keeps no more.
        read_only: never writes, moves or cleans up, as beside a run that is still going.

    Attributes:
        rejected: (step, reason) of every step that `restore` would not take.
    """

    def __init__(self, folder, keep_last: int, keep_every: int = 0, read_only: bool = False):
        assert keep_last >= 1 and keep_every >= 0, (keep_last, keep_every)  # TrainConfig checks
        quiet_orbax()
        self.folder = Path(folder).absolute()
        self.rejected: list[tuple[int, str]] = []
        self._keep_last, self._keep_every, self._read_only = keep_last, keep_every, read_only
        self._manager = None  # made by the first save, after restore has moved what is broken

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            logging.error("The last checkpoint was not saved: %s", failure)
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

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
            Exception: the save before this one failed.
        """
        start = time.perf_counter()
        if self._read_only:
            raise ValueError("save needs Checkpoints(..., read_only=False); got read_only=True.")
        leaves = digest.flatten_state(state)
        record = digest.build_record(step, leaves, meta)
        if self._manager is None:
            self._manager = _open_manager(self.folder, self._keep_last, self._keep_every)
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"a checkpoint's step must be above the newest one's, {newest}; got step={step} in "
                f"{self.folder}. Resume from it, or set another --config.workdir."
            )
        items = {"state": ocp.args.PyTreeSave(leaves), "record": ocp.args.JsonSave(record)}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Blocks until the last save is on disk. Raises what failed in the background, if any."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def restore(self, abstract_state, device_check=True, step=None) -> Restored | None:
        """The newest step that is what was saved, or None where no step is stored.

        Steps that are not are passed over with a warning, and moved to `checkpoints_rejected`
        beside the folder once an older one has been restored. Call it in every process.

        Args:
            abstract_state: pytree of jax.ShapeDtypeStruct with shardings, on any mesh.
            device_check: compares the digests of what was read, on the devices.
            step: only this one; None takes the newest good one.

        Raises:
            ValueError: the newest intact step is of another state, or of a newer format; or `step`
                is not stored.
            CheckpointError: steps are stored, and none can be trusted.
        """
        template = digest.flatten_state(abstract_state)
        unplaced = [path for path, leaf in template.items() if leaf.sharding is None]
        if unplaced:
            raise ValueError(f"abstract_state must hold shardings; got none for {unplaced}.")
        rejected, steps = [], from_process_0(self.steps)
        if step is not None:
            if step not in steps:
                raise ValueError(f"step must be one of {steps}; got {step}. Set --step.")
            steps = [step]
        for step in reversed(steps):
            folder, arrays = self.folder / str(step), None  # frees a rejected step's before reading
            try:
                record = from_process_0(lambda folder=folder: digest.read_record(folder))
                digest.check_format(record)
                digest.check_template(record, template)
                arrays = _read_arrays(folder, template)
                if device_check:
                    digest.check_digests(record, arrays)
            except CheckpointError as error:
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
            lines = "".join(f"\n  step {step}: {reason}" for step, reason in rejected)
            raise CheckpointError(
                f"{self.folder} holds no checkpoint that can be trusted:{lines}\n"
                "Nothing was moved. Put back a good step, or set another --config.workdir."
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
                reasons += f"\n  step {candidate}: {error}"
                continue
            digest.check_format(record)
            return record["meta"]
        if reasons:
            raise CheckpointError(f"{self.folder} holds no readable record:{reasons}")
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Moves these steps' folders out of the way, over nothing that is there already."""
        aside = self.folder.parent / "checkpoints_rejected"

        def move():
            aside.mkdir(exist_ok=True)
            for step in steps:
                names = [str(step)] + [f"{step}.{k}" for k in range(1, 1_000)]
                free = next(name for name in names if not (aside / name).exists())
                os.rename(self.folder / str(step), aside / free)

        from_process_0(move)
        if self._manager is not None:
            self._manager.reload()  # it caches what it has seen, and would refuse these steps


def _read_arrays(folder: Path, template: dict) -> dict:
    """Every leaf, where the template wants it; raises CheckpointError in all processes or none.

    By TensorStore alone: Orbax's own restore holds 0.5 to 0.9 of a second copy of the state, and
    after an unreadable leaf its other reads land in an event loop that it has closed.
    """
    arrays, reading, reason = {}, {}, ""
    paths = list(template)
    for i, path in enumerate(paths):
        try:
            for name in paths[i : i + 2]:  # the next one is read while this one is placed
                if name not in reading:
                    reading[name] = _start_reading(folder / "state", name, template[name])
            name, leaf, shards = path, template[path], reading.pop(path)
            read = lambda index, shards=shards: shards[str(index)].result()
            array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
            arrays[path] = jax.block_until_ready(array)
        except Exception as error:  # whatever it is, the other processes must hear of it
            reason = f"{name} cannot be read: {str(error)[:300]}"
            break
    reason = first_reason(reason)
    if reason:
        raise CheckpointError(reason)
    return arrays


def _start_reading(folder: Path, path: str, leaf) -> dict:
    """Futures of the parts of a leaf that this process's devices hold, by index."""
    base = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    stored = tensorstore.open(spec, open=True, read=True).result()
    found = jax.ShapeDtypeStruct(stored.shape, stored.dtype.numpy_dtype)
    if digest.describe(found) != digest.describe(leaf):
        raise ValueError(f"stored as {digest.describe(found)}, recorded as {digest.describe(leaf)}")
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    parts = {str(index): index for index in indices}  # copies on several devices are read once
    return {key: stored[index].read() for key, index in parts.items()}


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
    return ocp.CheckpointManager(folder, options=options, handler_registry=registry)


def from_process_0(function):
    """function()'s JSON-able value on process 0, in every process.

    Raises:
        CheckpointError: function raised on process 0; in every process, with its text.
    """
    answer = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except (CheckpointError, OSError) as error:
            answer = {"error": str(error)}
    if jax.process_count() > 1:
        text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
        text = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
        answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return answer["value"]


def first_reason(reason: str) -> str:
    """The first process's reason that is not empty, in every process."""
    if jax.process_count() == 1:
        return reason
    text = reason.encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")
    texts = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(texts)]
    return next((f"process {i}: {text}" for i, text in enumerate(texts) if text), "")


def quiet_orbax() -> None:
    """Drops Orbax's lines below warnings from absl's log; ours and others stay."""
    logger = std_logging.getLogger("absl")
    if _is_not_chatter not in logger.filters:
        logger.addFilter(_is_not_chatter)


def _is_not_chatter(record) -> bool:
    return record.levelno >= std_logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname

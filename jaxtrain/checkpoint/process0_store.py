"""Stores checkpoints in a folder of process 0 only (checkpoint.storage=host0).

Process 0 gathers every array in pieces and writes it; on restoring it reads and broadcasts. Orbax
needs a folder that all processes share. The files have the layout that the shared store reads, so
a run may switch between the two. All processes call every method here together; an
error of process 0's disk is raised in all of them.
"""

import json
import os
import shutil
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

from jaxtrain.checkpoint import zarr
from jaxtrain.checkpoint.step_folders import list_steps
from jaxtrain.distributed.broadcast import broadcast_from_process_0, gather_first_error
from jaxtrain.distributed.mesh import replicated
from jaxtrain.errors import CheckpointError, SaveFailed
from jaxtrain.file_errors import add_path_to_errors, describe_storage_error
from jaxtrain.files import strict_json, sync_to_disk

PIECE_BYTES = 256 << 20  # gathered at a time; a process stores each piece twice
IN_FLIGHT = 2  # pieces that are being written


class Process0Store:
    """The arrays of each step in `folder` on process 0's host. `save` blocks until it is done."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int, piece_bytes=PIECE_BYTES):
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._piece_bytes = piece_bytes

    def check(self) -> None:
        """Does nothing: the processes need not share a folder."""

    def newest(self) -> int | None:
        """Returns the newest stored step, in every process."""
        return broadcast_from_process_0(lambda: max(list_steps(self._folder), default=None))

    def save(self, step: int, leaves: dict[str, jax.Array], record: dict[str, Any]) -> None:
        """Writes a step. Raises SaveFailed in all processes if process 0 cannot write."""
        is_writer = jax.process_index() == 0
        draft = self._folder / f".{step}.tmp"
        reason, writing = "", deque()
        for path, leaf in leaves.items():
            axis, pieces = self._split(leaf)
            store = None
            for start, stop in pieces:
                piece = _gather(leaf, axis, start, stop)
                if not is_writer or reason:
                    continue  # after an error too: gathering is a collective of all processes
                try:
                    if path == next(iter(leaves)) and start == 0:
                        shutil.rmtree(draft, ignore_errors=True)
                    store = store or _create(draft / "state", path, leaf, axis, stop - start)
                    where = (slice(None),) * axis + (slice(start, stop),)
                    writing.append((store[where] if leaf.ndim else store).write(piece))
                    while len(writing) > IN_FLIGHT:
                        writing.popleft().result()
                except Exception as error:  # whatever it is: the other processes gather on
                    reason = describe_storage_error(error, self._folder)
                    reason = reason or f"{draft}: {zarr.shorten_error(error)}"
        reason = gather_first_error(reason)
        if reason:
            raise SaveFailed(f"checkpoint {step} was not saved: {reason}")
        broadcast_from_process_0(lambda: self._commit(draft, step, record, writing))

    def _commit(self, draft: Path, step: int, record: dict[str, Any], writing: deque) -> None:
        """Finishes the step's files, renames their folder, and deletes steps that are too old."""
        try:
            for write in writing:
                write.result()
        except ValueError as error:
            reason = describe_storage_error(error, self._folder) or zarr.shorten_error(error)
            raise SaveFailed(f"checkpoint {step} was not saved: {reason}") from error
        (draft / "record").mkdir()
        with add_path_to_errors(draft):
            (draft / "record" / "metadata").write_text(strict_json(record))
            (draft / "state" / "_METADATA").write_text(json.dumps({"written_by": "host0"}))
            # On disk before the rename: after a power cut a final name means a complete step.
            for path in [*draft.rglob("*"), draft]:
                sync_to_disk(path)
        os.rename(draft, self._folder / str(step))
        sync_to_disk(self._folder)
        steps = list_steps(self._folder)
        for old in steps[: -self._keep_last]:
            if not (self._keep_every and old % self._keep_every == 0):
                shutil.rmtree(self._folder / str(old))

    def _split(self, leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, list[tuple[int, int]]]:
        return split_into_pieces(leaf.shape, leaf.dtype, leaf.sharding, self._piece_bytes)

    def is_saving(self) -> bool:
        """Returns False: `save` blocks until all is on disk."""
        return False

    def discard(self, step: int) -> None:
        """Removes what a failed save of this step has written."""
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / f".{step}.tmp", ignore_errors=True)

    def wait(self) -> None:
        """Does nothing, nor do reload and close: no save is ever running, no listing is cached."""

    reload = close = wait

    def read(self, folder: Path, template: dict[str, Any]) -> dict[str, jax.Array]:
        """Reads every leaf in process 0 and sends each process the parts that its devices need.

        Raises:
            CheckpointError: a leaf cannot be read; raised in every process.
        """
        arrays, reason = {}, ""
        for path, leaf in template.items():
            axis, pieces = self._split(leaf)
            parts = _local_parts(leaf)
            store = None
            for start, stop in pieces:
                piece = None
                if jax.process_index() == 0 and not reason:
                    try:
                        store = store or zarr.open_stored(folder / "state", path, leaf)
                        where = (slice(None),) * axis + (slice(start, stop),)
                        piece = (store[where] if leaf.ndim else store).read().result()
                    except Exception as error:
                        reason = f"{path} cannot be read: {zarr.shorten_error(error)}"
                shape = (*leaf.shape[:axis], stop - start, *leaf.shape[axis + 1 :])
                piece = _broadcast(piece, shape if leaf.ndim else (), leaf.dtype)
                _copy_to_parts(piece, parts, axis, start, stop)
            read = lambda index, parts=parts: parts[str(index)][1]
            arrays[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
        reason = gather_first_error(reason)
        if reason:
            raise CheckpointError(reason)
        return arrays


def split_into_pieces(
    shape: tuple[int, ...], dtype: Any, sharding: Any, piece_bytes: int
) -> tuple[int, list[tuple[int, int]]]:
    """Returns (axis, [(start, stop)]): pieces of at most piece_bytes along one axis.

    The axis is the longest that no mesh axis splits, so that a piece is spread over the devices as
    the array is. An array that is split along every axis is one piece; a single row may exceed
    piece_bytes.
    """
    if not shape:
        return 0, [(0, 1)]
    spec = (*getattr(sharding, "spec", ()), *[None] * len(shape))[: len(shape)]
    unsplit = [axis for axis, name in enumerate(spec) if name is None]
    if not unsplit:
        return 0, [(0, shape[0])]
    axis = max(unsplit, key=lambda axis: shape[axis])
    row_bytes = int(np.prod(shape)) // max(shape[axis], 1) * np.dtype(dtype).itemsize
    rows = min(max(1, piece_bytes // max(row_bytes, 1)), shape[axis])
    return axis, [(i, min(i + rows, shape[axis])) for i in range(0, shape[axis], rows)]


def _gather(leaf: jax.Array, axis: int, start: int, stop: int) -> np.ndarray:
    """Returns rows start to stop along an axis, whole, in every process."""
    mesh = getattr(leaf.sharding, "mesh", None)
    if leaf.ndim == 0 or mesh is None:
        return np.asarray(leaf.addressable_data(0))
    piece = _slice(leaf, np.int32(start), axis, stop - start, replicated(mesh))
    return np.asarray(piece.addressable_data(0))


@partial(jax.jit, static_argnums=(2, 3, 4))  # start is traced: one program for all pieces
def _slice(x, start, axis, size, sharding):
    piece = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    return jax.lax.with_sharding_constraint(piece, sharding)


def _broadcast(piece: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns process 0's piece in every process; None stands for zeros.

    JAX broadcasts by summing process 0's values with zeros, and -0.0 + 0.0 is +0.0. Sent as bytes,
    every bit arrives.
    """
    if jax.process_count() == 1:
        return np.zeros(shape, dtype) if piece is None else piece
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    sent = np.zeros(size, np.uint8)
    if piece is not None:
        sent = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return sent.view(dtype).reshape(shape)


def _local_parts(leaf: jax.ShapeDtypeStruct) -> dict[str, tuple]:
    """Returns {str(index): (index, empty array)} of the parts that this process's devices need."""
    parts = {}
    assert leaf.sharding is not None  # restore() checks
    for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        assert index is not None
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)]
        parts[str(index)] = (index, np.empty(sizes, leaf.dtype))
    return parts


def _copy_to_parts(piece: np.ndarray, parts: dict, axis: int, start: int, stop: int) -> None:
    """Copies rows start to stop along an axis into the parts that include any of them."""
    for index, part in parts.values():
        if part.ndim == 0:
            part[...] = piece
            continue
        first = index[axis].start or 0
        low, high = max(start, first), min(stop, first + part.shape[axis])
        if low < high:
            here = (slice(None),) * axis + (slice(low - first, high - first),)
            there = index[:axis] + (slice(low - start, high - start),) + index[axis + 1 :]
            part[here] = piece[there]


def _create(folder: Path, path: str, leaf: jax.Array, axis: int, rows: int):
    """Creates an array on disk, in chunks of the pieces that will be written."""
    chunks = [*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :]] if leaf.ndim else []
    spec = zarr.spec(folder, path) | {"metadata": {"chunks": chunks, "compressor": None}}
    dtype = tensorstore.dtype(np.dtype(leaf.dtype))
    return tensorstore.open(spec, create=True, dtype=dtype, shape=leaf.shape).result()

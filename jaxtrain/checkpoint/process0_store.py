"""Process 0's own folder: it gathers every array in pieces, writes alone, and feeds the others.

The files are those that `shared` reads, so a run may change from one to the other. All processes
call every function here together; a failure of process 0's disk is an error in all of them.
"""

import json
import os
import shutil
from collections import deque
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

from jaxtrain.checkpoint import zarr
from jaxtrain.distributed.broadcast import broadcast_from_process_0, gather_first_error
from jaxtrain.distributed.mesh import replicated
from jaxtrain.errors import CheckpointError, SaveFailed
from jaxtrain.file_errors import add_path_to_errors, describe_storage_error
from jaxtrain.files import strict_json, sync_to_disk

PIECE_BYTES = 256 << 20  # of an array that a process holds twice while it is gathered
IN_FLIGHT = 2  # pieces being written


class Process0Store:
    """Steps' arrays in `folder` on process 0's host. Saves are over when `save` returns."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int, piece_bytes=PIECE_BYTES):
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._piece_bytes = piece_bytes

    def check(self) -> None:
        pass

    def newest(self) -> int | None:
        return broadcast_from_process_0(lambda: max(_steps(self._folder), default=None))

    def save(self, step: int, leaves: dict, record: dict) -> None:
        """Raises SaveFailed in all processes where process 0 could not write."""
        first = jax.process_index() == 0
        draft = self._folder / f".{step}.tmp"
        reason, writing = "", deque()
        for path, leaf in leaves.items():
            axis, cuts = cut(leaf.shape, leaf.dtype, leaf.sharding, self._piece_bytes)
            store = None
            for start, stop in cuts:
                piece = _gather(leaf, axis, start, stop)
                if not first or reason:
                    continue  # the others count on this process to gather with them
                try:
                    if path == next(iter(leaves)) and start == 0:
                        shutil.rmtree(draft, ignore_errors=True)
                    store = store or _create(draft / "state", path, leaf, axis, stop - start)
                    where = (slice(None),) * axis + (slice(start, stop),)
                    writing.append((store[where] if leaf.ndim else store).write(piece))
                    while len(writing) > IN_FLIGHT:
                        writing.popleft().result()
                except Exception as error:  # whatever it is, the other processes must hear of it
                    reason = (
                        describe_storage_error(error, self._folder) or f"{draft}: {zarr.why(error)}"
                    )
        reason = gather_first_error(reason)
        if reason:
            raise SaveFailed(f"checkpoint {step} was not saved: {reason}")
        broadcast_from_process_0(lambda: self._commit(draft, step, record, writing))

    def _commit(self, draft, step, record, writing) -> None:
        try:
            for write in writing:
                write.result()
        except ValueError as error:
            reason = describe_storage_error(error, self._folder) or zarr.why(error)
            raise SaveFailed(f"checkpoint {step} was not saved: {reason}") from error
        (draft / "record").mkdir()
        with add_path_to_errors(draft):
            (draft / "record" / "metadata").write_text(strict_json(record))
            (draft / "state" / "_METADATA").write_text(json.dumps({"written_by": "host0"}))
            for path in [*draft.rglob("*"), draft]:
                sync_to_disk(path)
        os.rename(draft, self._folder / str(step))
        sync_to_disk(self._folder)
        steps = _steps(self._folder)
        for old in steps[: -self._keep_last]:
            if not (self._keep_every and old % self._keep_every == 0):
                shutil.rmtree(self._folder / str(old))

    def is_saving(self) -> bool:
        return False  # it blocks until all is on disk

    def discard(self, step: int) -> None:
        """Removes what a failed save of this step has written."""
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / f".{step}.tmp", ignore_errors=True)

    def wait(self) -> None:
        pass

    reload = close = wait

    def read(self, folder: Path, template: dict) -> dict:
        """Every leaf, read by process 0 and placed where the template wants it.

        Raises:
            CheckpointError: in all processes or none.
        """
        arrays, reason = {}, ""
        for path, leaf in template.items():
            axis, cuts = cut(leaf.shape, leaf.dtype, leaf.sharding, self._piece_bytes)
            parts = _local_parts(leaf)
            store = None
            for start, stop in cuts:
                piece = None
                if jax.process_index() == 0 and not reason:
                    try:
                        store = store or zarr.open_stored(folder / "state", path, leaf)
                        where = (slice(None),) * axis + (slice(start, stop),)
                        piece = (store[where] if leaf.ndim else store).read().result()
                    except Exception as error:
                        reason = f"{path} cannot be read: {zarr.why(error)}"
                shape = (*leaf.shape[:axis], stop - start, *leaf.shape[axis + 1 :])
                piece = _broadcast(piece, shape if leaf.ndim else (), leaf.dtype)
                _place(piece, parts, axis, start, stop)
            read = lambda index, parts=parts: parts[str(index)][1]
            arrays[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
        reason = gather_first_error(reason)
        if reason:
            raise CheckpointError(reason)
        return arrays


def cut(shape, dtype, sharding, piece_bytes: int) -> tuple[int, list[tuple[int, int]]]:
    """(axis, [(start, stop)]): an axis that is on no mesh axis, in pieces of at most piece_bytes.

    An array that is split along every axis, or a row of which is larger, is one piece.
    """
    if not shape:
        return 0, [(0, 1)]
    spec = (*getattr(sharding, "spec", ()), *[None] * len(shape))[: len(shape)]
    whole = [axis for axis, name in enumerate(spec) if name is None]
    if not whole:
        return 0, [(0, shape[0])]
    axis = max(whole, key=lambda axis: shape[axis])
    row_bytes = int(np.prod(shape)) // max(shape[axis], 1) * np.dtype(dtype).itemsize
    rows = min(max(1, piece_bytes // max(row_bytes, 1)), shape[axis])
    return axis, [(i, min(i + rows, shape[axis])) for i in range(0, shape[axis], rows)]


def _gather(leaf, axis: int, start: int, stop: int):
    """The piece, whole, on every process: NumPy."""
    mesh = getattr(leaf.sharding, "mesh", None)
    if leaf.ndim == 0 or mesh is None:
        return np.asarray(leaf.addressable_data(0))
    piece = _slice(leaf, np.int32(start), axis, stop - start, replicated(mesh))
    return np.asarray(piece.addressable_data(0))


@partial(jax.jit, static_argnums=(2, 3, 4))
def _slice(x, start, axis, size, sharding):
    piece = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    return jax.lax.with_sharding_constraint(piece, sharding)


def _broadcast(piece, shape, dtype):
    """Process 0's piece on every process, bit for bit: as bytes, for sums would lose -0.0."""
    if jax.process_count() == 1:
        return np.zeros(shape, dtype) if piece is None else piece
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    sent = np.zeros(size, np.uint8)
    if piece is not None:
        sent = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return sent.view(dtype).reshape(shape)


def _local_parts(leaf) -> dict:
    """{str(index): (index, empty array)} of the parts that this process's devices hold."""
    parts = {}
    for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)]
        parts[str(index)] = (index, np.empty(sizes, leaf.dtype))
    return parts


def _place(piece, parts: dict, axis: int, start: int, stop: int) -> None:
    """Copies what each part holds of rows start to stop; along other axes the piece is whole."""
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


def _create(folder: Path, path: str, leaf, axis: int, rows: int):
    chunks = [*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :]] if leaf.ndim else []
    spec = zarr.spec(folder, path) | {"metadata": {"chunks": chunks, "compressor": None}}
    dtype = tensorstore.dtype(np.dtype(leaf.dtype))
    return tensorstore.open(spec, create=True, dtype=dtype, shape=leaf.shape).result()


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())

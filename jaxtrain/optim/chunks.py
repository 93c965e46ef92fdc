"""Applies a function to a stack of matrices a few at a time, which bounds its temporaries."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtrain.distributed.mesh import platform

GPU_CHUNK_BYTES = 2**28  # least chunk on a GPU, which is faster with many matrices at once


def chunk_size(shape: Sequence[int], gram: bool, chunk_bytes: int | None) -> int:
    """Returns the largest divisor of X whose matrices' Newton-Schulz temporaries fit.

    Args:
        shape: [X,I,O].
        gram: the iteration is on Gram matrices.
        chunk_bytes: bound on the float32 temporaries; None is half of a float32 stack, more on a
            GPU: less would save little memory. 0 takes all matrices.
    """
    X, I, O = shape  # noqa: E741
    if chunk_bytes is None:
        chunk_bytes = max(2 * math.prod(shape), 0 if platform() == "cpu" else GPU_CHUNK_BYTES)
    elif not chunk_bytes:
        return X
    M, N = min(I, O), max(I, O)
    entries = 2 * M * N + 3 * M * M
    if gram:  # x and seven [M,M] exist at once
        entries = max(entries, M * N + 7 * M * M)
    fits = chunk_bytes // (4 * entries)
    return max(size for size in range(1, X + 1) if X % size == 0 and size <= max(fits, 1))


def map_chunks(function: Callable[[Any], Any], stacks: Any, size: int) -> Any:
    """Applies function to `size` matrices at a time; each result overwrites its input.

    Args:
        function: maps a chunk to one of the same structure, shapes and types.
        stacks: pytree of arrays [X,...].
        size: of a chunk; divides X.
    """

    def update_chunk(i, stacks):
        chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), stacks)
        put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * size, 0)
        return jax.tree.map(put, stacks, function(chunk))

    chunks = len(jax.tree.leaves(stacks)[0]) // size
    return jax.lax.fori_loop(0, chunks, update_chunk, stacks) if chunks > 1 else function(stacks)

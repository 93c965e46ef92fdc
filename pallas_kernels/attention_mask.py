"""The scale and the mask that attention's Triton kernels share."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import triton


def exponent_scale(K: int) -> float:
    """Returns log2(e) / sqrt(K), which makes the product of q and k an exponent of exp2."""
    return math.log2(math.e) * K**-0.5


def sees_itself(
    batch_size: int, T: int, S: int, docs: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Returns a tuple of one int32 array [B,T]: 1 where a query sees the key at its own position.

    If all queries do, the tuple is empty. A query whose sum of exponentials is 0 sees either no key
    or only scores of -inf, whose softmax is nan: a query that sees any key is assumed to see that
    at its own position, as it does wherever queries and keys have the same documents.

    Args:
        docs: (docs_BT, docs_BS) or ().
    """
    sees_BT = jnp.broadcast_to(jnp.arange(T) >= T - S, (batch_size, T))
    if docs:
        docs_BT, docs_BS = docs
        own_BT = jnp.pad(docs_BS[:, max(S - T, 0) :], ((0, 0), (max(T - S, 0), 0)))
        sees_BT &= docs_BT == own_BT
    return (sees_BT.astype(jnp.int32),) if docs or S < T else ()


def visible_pairs(
    batch: Any,
    rows: jax.Array,
    columns: jax.Array,
    T: int,
    S: int,
    docs: Sequence[Any],
    window: int | None,
    keys_first: bool = False,
) -> jax.Array:
    """Returns where a query sees a key; a row of padding, whose zeros times inf are nan, sees none.

    Masks depend on positions, not on scores, so nan reaches the results wherever it is visible.

    Args:
        rows, columns: the positions of the queries and of the keys.
        docs: the refs of the documents of all queries and of all keys, or nothing.
        window: how many of the keys up to its own position a query sees; None: all.
        keys_first: returns [keys,queries] instead of [queries,keys].
    """
    along_queries, along_keys = (
        lambda x, axis=axis: jnp.expand_dims(x, axis) for axis in ((0, 1) if keys_first else (1, 0))
    )
    last = jnp.where(rows < T, rows + (S - T), -1)
    mask = along_keys(columns) <= along_queries(last)
    if window is not None:
        mask &= along_keys(columns) > along_queries(last - window)
    if docs:
        # Padding of queries and of keys gets different numbers, so that it never matches.
        query_docs, key_docs = (
            triton.load(ref.at[batch, at], mask=at < ref.shape[1], other=other)
            for ref, at, other in zip(docs, (rows, columns), (-2, -3), strict=True)
        )
        mask &= along_queries(query_docs) == along_keys(key_docs)
    return mask

"""The arrays of a training batch: their shapes, weights, sources and microbatches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.config.data_section import DataConfig
from jaxtrain.distributed.mesh import batch_sharding


def abstract_batch(cfg: DataConfig, mesh: Mesh) -> dict:
    """Returns what `data.build_batches` yields, as ShapeDtypeStructs."""
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    tokens = struct((cfg.batch, cfg.seq_len + 1), jnp.int32)
    batch = {"tokens": tokens}
    if cfg.pack or cfg.document_mask:
        batch |= {"docs": tokens, "weights": struct((cfg.batch, cfg.seq_len), jnp.float32)}
    if cfg.mixture:
        batch["source"] = struct((cfg.batch,), jnp.int32)
    return batch


def target_weights(batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the weight of each target [B,T]; float32, or float64 where that is enabled.

    The batch's "weights" [B,T] if it has them; else 1 for a token and 0 for padding.
    """
    if "weights" in batch:
        return batch["weights"].astype(float)
    if "docs" not in batch:
        return jnp.ones(batch["tokens"][:, 1:].shape, float)
    return (batch["docs"][:, 1:] >= 0).astype(float)


def source_groups(batch: dict, sources: int, dtype: Any) -> jax.Array:
    """Returns 1 where a row is of a source of the mixture, else 0: [B,S]."""
    return jax.nn.one_hot(batch["source"], sources, dtype=dtype)


def microbatches(x: jax.Array, count: int) -> jax.Array:
    """Reshapes [B,...] to [count,B/count,...].

    Microbatch i takes rows i, i + count, ...: every device holds a share of each microbatch, and
    no row moves to another device.
    """
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

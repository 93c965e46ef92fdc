"""Finds numbers that are not finite in a training state, and the process that they are on."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.distributed.broadcast import gather_texts


def _floating(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Returns whether all floating-point numbers of a pytree are finite: bool []."""
    return jnp.array([jnp.isfinite(x).all() for x in _floating(tree)]).all()


def is_sound(scalars: dict[str, jax.Array], state: Any, is_last: bool) -> bool:
    """Returns whether a state may be saved: if the scalars of its last step are finite.

    A skipped step changes nothing, but the update before it may be why it was skipped. Saving that
    state would push an older, good checkpoint out of keep_last. After the run's last step, or if
    there was no step since the start (no scalars), a finite state is enough.
    """
    numbers = jax.device_get(scalars)
    if numbers and not numbers["train/bad_steps"] and all(map(math.isfinite, numbers.values())):
        return True
    return (is_last or not numbers) and bool(jax.device_get(all_finite(state)))


def is_finite_here(tree: Any) -> bool:
    """Returns whether the parts of a pytree's arrays on this process's devices are finite.

    Copies of one array can differ between devices if the hardware is at fault. It compares on the
    host, part by part, as the devices' memory may be full.
    """
    parts = (shard.data for leaf in _floating(tree) for shard in leaf.addressable_shards)
    return all(bool(np.isfinite(np.asarray(part)).all()) for part in parts)


def name_spoiled_processes(tree: Any) -> str:
    """Returns which processes have parts of a state that are not finite; "" if all or none do.

    A step that is not finite changes nothing. So if the fault is one machine's, the others' state
    stays finite. Every process must call it.
    """
    return describe_spoiled(gather_texts("" if is_finite_here(tree) else "not finite"))


def describe_spoiled(texts: list[str]) -> str:
    """Returns a sentence on the processes whose text is not empty; "" if they are all or none."""
    spoiled = [i for i, text in enumerate(texts) if text]
    if not 0 < len(spoiled) < len(texts):
        return ""
    named = ", ".join(
        f"process {i}: its weights or optimizer state are not finite" for i in spoiled
    )
    return f"{named}; the others' are. Look for a fault of that machine, then start again."

"""What a contest of bench is, and what the contests of all ops share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The largest relative distance from float64, as in tests/test_kernels_references.py: of results in
# bfloat16, of attention's, and of float32 sums over bfloat16 results.
HALF, ATTENTION, NATS = 3e-3, 5e-3, 1e-5


class Contest(NamedTuple):
    """One op at one shape and direction."""

    op: str  # of kernel_choice.OPS
    name: str
    shape: tuple  # as in kernel_choice.BenchRow
    arrays: Callable[[jax.Array], list[jax.Array]]  # random key -> every contestant's arguments
    kernel: Callable[[Any], Callable]  # tiles -> our kernel
    others: dict[str, Callable]  # {name: another implementation}
    # The results in float64, from the same numbers: a function of the arrays, called with x64.
    exact: Callable
    tolerances: tuple[float, ...]  # of each result
    flops: float
    hbm_bytes: float
    documents: bool = False  # attention is masked between documents
    window: int = 0  # keys that a query of attention sees; 0: all
    shipped: bool = True  # whether a shipped model trains this shape
    in_table: bool = True  # whether its row enters the chip's table, if it is of both ways


def normal(key: jax.Array, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Returns bfloat16 arrays of normal numbers."""
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def with_gradients(forward: Callable, count: int, inputs: int) -> Callable:
    """Returns a function of inputs and cotangents that computes `forward` and gradients.

    Args:
        count: how many of the inputs, from the first on, get a gradient.
        inputs: how many inputs there are.
    """

    def both_ways(*arrays):
        tables, cotangents = arrays[count:inputs], arrays[inputs:]
        out, pullback = jax.vjp(lambda *x: forward(*x, *tables), *arrays[:count])
        return out, pullback(cotangents if isinstance(out, tuple) else cotangents[0])

    return both_ways


def wide(*arrays: jax.Array) -> list[jax.Array]:
    """Returns the floating-point arrays in float64, and the others as they are."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return [x.astype(jnp.float64) if is_float(x) else x for x in arrays]

"""Compares an implementation of a contest with float64, before anyone times it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.contest import HALF, Contest

SEEDS = (1, 2)  # of the random inputs


class Comparison(NamedTuple):
    """The result of comparing one implementation with float64."""

    distances: tuple[float, ...]  # relative, of each result: the largest over the inputs
    fault: str  # "" if there is none


def exact_results(contest: Contest, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the contest's results in float64, from the same numbers."""
    with jax.enable_x64(True):
        return jax.block_until_ready(jax.tree.leaves(jax.jit(contest.exact)(*arrays)))


@jax.jit
def _distances(got, want):
    """Returns |x - y| / |y| of each pair in float64; NaN and infinities in x give NaN."""
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float64).ravel())
    return [norm(x.astype(jnp.float64) - y) / norm(y) for x, y in zip(got, want, strict=True)]


@jax.jit
def _same_bits(got, again):
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = lambda x: jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize])
    pairs = zip(got, again, strict=True)
    return jnp.all(jnp.stack([jnp.array_equal(bits(x), bits(y)) for x, y in pairs]))


def _poison(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> None:
    """Fills the memory that the next call will probably get for its results with NaN.

    A result that the kernel does not write is then not, by chance, what an earlier call wrote.
    """
    arrays = [jnp.full(shape, jnp.nan, dtype) for shape, dtype in shapes]
    for x in jax.block_until_ready(arrays):
        x.delete()


def compare(
    contest: Contest,
    function: Callable[[], Any],
    exact: Sequence[Sequence[jax.Array]],
    ours: bool = True,
) -> Comparison:
    """Compares a compiled implementation with float64 on each of the inputs.

    Faults are: a result farther from float64 than the contest's tolerance, a result that is not
    finite, and a second call on the same input whose bits differ from the first's.

    Args:
        function: returns the results for each of the inputs.
        exact: exact_results of each of the inputs.
        ours: whether it is our kernel. Others may differ in their bits from call to call, and from
            our rounding of float32 results: XLA, for one, leaves out roundings to bfloat16.
    """
    largest = [0.0] * len(contest.tolerances)
    _poison([(x.shape, x.dtype) for x in jax.tree.leaves(function())])
    got = jax.block_until_ready(function())
    if ours and not _same_bits(jax.tree.leaves(got), jax.tree.leaves(function())):
        return Comparison(tuple(largest), "two calls on the same input differ in their bits")
    for results, want in zip(got, exact, strict=True):
        with jax.enable_x64(True):
            distances = map(float, _distances(jax.tree.leaves(results), want))
        # max() would drop a NaN, depending on its place.
        pairs = zip(largest, distances, strict=True)
        largest = [x if math.isnan(x) else max(most, x) for most, x in pairs]
    tolerances = [most if ours else max(most, HALF) for most in contest.tolerances]
    for i, (distance, most) in enumerate(zip(largest, tolerances, strict=True)):
        if not distance <= most:
            fault = f"result {i} is {distance:.2g} from float64, at most {most:g} is allowed"
            return Comparison(tuple(largest), fault)
    return Comparison(tuple(largest), "")

"""Gives each device whole matrices of a stack, for optimizers whose state belongs to a matrix.

`sharded_muon` pools matrices of one shape and pads the pool, which loads all devices evenly. State
that stays with its matrix cannot be padded: its shape, and so checkpoints, would depend on the
mesh. Here the first stack dim of each parameter is split over those mesh axes that divide it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.axes import Axes
from jaxtrain.distributed.mesh import param_spec


class Move(NamedTuple):
    """What one mesh axis does on the way to the owners; the way back undoes it."""

    name: str
    dim: int | None  # dim of the parameter that it splits; None: devices along it have copies
    owns: bool  # devices along it get different matrices, otherwise the same

    def forward(self, x: jax.Array, size: int) -> jax.Array:
        """Brings one device's part of the parameter closer to its matrices."""
        if self.dim is None:
            return _own_part(x, 0, self.name, size) if self.owns else x
        if self.owns:
            return jax.lax.all_to_all(x, self.name, 0, self.dim, tiled=True)
        return jax.lax.all_gather(x, self.name, axis=self.dim, tiled=True)

    def backward(self, x: jax.Array, size: int) -> jax.Array:
        """Undoes `forward`."""
        if self.dim is None:
            return jax.lax.all_gather(x, self.name, tiled=True) if self.owns else x
        if self.owns:
            return jax.lax.all_to_all(x, self.name, self.dim, 0, tiled=True)
        return _own_part(x, self.dim, self.name, size)


def _own_part(x, dim, name, size):
    part = x.shape[dim] // size
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * part, part, dim)


class Ownership(NamedTuple):
    """How a parameter's gradient travels to the devices that step its matrices, and back."""

    stored: P  # the parameter's layout, split over `replica` too if replicas own different matrices
    owned: P  # layout of the owners' arrays; their first dim is the stack, flattened or not
    moves: list[Move]
    owners: int  # devices with different matrices


def ownership(axes: Axes, shape: Sequence[int], mesh: Mesh) -> Ownership:
    """Chooses which devices own which matrices of a parameter.

    Of all sets of mesh axes whose sizes divide the first stack dim, it is the one with the most
    devices. Devices along the other axes repeat the work.
    """
    spec, stacks = param_spec(axes, shape, mesh), min(len(axes.stack), 1)
    names = [name for name, size in mesh.shape.items() if size > 1]
    first = [name for name in names if name in spec[:stacks]]  # it splits the stack already
    subsets = [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]
    count = lambda subset: math.prod(mesh.shape[name] for name in subset)
    fits = lambda c: {*first} <= {*c} and shape[0] % count(c) == 0
    owners = max(filter(fits, subsets), key=count) if stacks else ()
    if "replica" in owners:  # so that gradients are reduced by one reduce-scatter
        first.insert(0, "replica")
    dims = {name: dim for dim, name in enumerate(spec) if dim >= stacks}
    moves = [Move(n, dims.get(n), n in owners) for n in names if n not in first]
    owned = (*first, *(move.name for move in moves if move.owns))
    stored = P(tuple(first) or None, *spec[1:]) if stacks else spec
    return Ownership(stored, P(owned or None), moves, count(owned))


def to_owners(x: jax.Array, moves: Sequence[Move], mesh: Mesh) -> jax.Array:
    """Turns one device's part of a parameter into its matrices, inside shard_map."""
    for move in moves:
        x = move.forward(x, mesh.shape[move.name])
    return x


def from_owners(x: jax.Array, moves: Sequence[Move], mesh: Mesh) -> jax.Array:
    """Undoes `to_owners`."""
    for move in reversed(moves):
        x = move.backward(x, mesh.shape[move.name])
    return x

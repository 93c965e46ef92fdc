"""Divides the parameters into fragments, each of which is exchanged as one flat vector.

A fragment consists of whole leaves of the parameter tree. Its vector is their concatenation in the
order of the tree, each in row-major order, padded with zeros to whole blocks. It is the same on any
mesh. Process p of P owns the blocks `owned_blocks(blocks, P, p)` of it.

On the devices a vector is [P,width]: row p has the blocks of process p, padded to the longest row
and to a multiple of its devices. Each device holds one piece, so that the transfer to the hosts
uses all of them, and a host receives exactly what it owns.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.model.trees import ArrayTree, named_leaves
from jaxtrain.optim.acceleration import eval_params
from jaxtrain.sites import BLOCK
from jaxtrain.sites.layout import owned_blocks


class Fragment(NamedTuple):
    """Some leaves of the parameter tree, and their shapes, in the order of the tree."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def blocks(self) -> int:
        return -(-self.elements // BLOCK)


def split_leaves(shapes: Mapping[str, Sequence[int]], fragments: int) -> list[Fragment]:
    """Divides leaves into fragments of about equal size: the largest first, to the smallest so far.

    Args:
        shapes: by the leaf's path, in the order of the tree.

    Raises:
        ValueError: there are more fragments than leaves.
    """
    if fragments > len(shapes):
        raise ValueError(
            f"sites.fragments must be at most {len(shapes)}, the model's number of parameter "
            f"arrays; got {fragments}. Set --sites.fragments."
        )
    sizes, place = [0] * fragments, {}
    for path in sorted(shapes, key=lambda path: -math.prod(shapes[path])):  # stable: ties by tree
        place[path] = sizes.index(min(sizes))
        sizes[place[path]] += max(math.prod(shapes[path]), 1)
    return [
        Fragment({path: tuple(shape) for path, shape in shapes.items() if place[path] == f})
        for f in range(fragments)
    ]


def rounds_until(step: int, period: int, fragment: int, fragments: int) -> int:
    """Returns how many rounds of a fragment are to start after the steps 1 to `step`.

    One starts in each period; those of different fragments are evenly shifted over it.
    """
    shift = fragment * period // fragments
    return (step - shift) // period + (shift > 0)


class DeviceLayout:
    """Where the parts of one fragment's vector are: on the devices, and in this process.

    Raises:
        ValueError: the processes' devices are not contiguous in the mesh, or not equally many.
    """

    def __init__(self, fragment: Fragment, mesh: Mesh):
        processes = [device.process_index for device in mesh.devices.flat]
        counts = Counter(processes)
        if processes != sorted(processes) or len(set(counts.values())) > 1:
            raise ValueError(
                "with several sites, the devices of each process must be contiguous in the mesh "
                f"and equally many; got the processes {processes}. Set --mesh.replica or "
                "--mesh.fsdp."
            )
        rows, own = list(counts), jax.process_index()
        self.blocks = [owned_blocks(fragment.blocks, len(rows), p) for p in range(len(rows))]
        self.process = rows.index(own) if own in counts else 0
        self.owned = self.blocks[self.process]
        devices = counts[rows[0]]
        self._width = -(-max(map(len, self.blocks)) * BLOCK // devices) * devices
        self.fragment = fragment
        self.sharding = NamedSharding(mesh, P(mesh.axis_names))
        self.shape = (len(rows) * self._width,)

    def flatten(self, params: ArrayTree) -> jax.Array:
        """Returns the fragment's vector as it lies on the devices; traceable."""
        leaves = named_leaves(params)
        vector = jnp.concatenate(
            [leaves[path].reshape(-1).astype(jnp.float32) for path in self.fragment.shapes]
        )
        vector = jnp.pad(vector, (0, self.fragment.blocks * BLOCK - vector.size))
        rows = [vector[part.start * BLOCK : part.stop * BLOCK] for part in self.blocks]
        return jnp.concatenate([jnp.pad(row, (0, self._width - row.size)) for row in rows])

    def unflatten(self, vector: jax.Array) -> dict[str, jax.Array]:
        """Inverts flatten: returns {path: leaf}; traceable."""
        rows = vector.reshape(len(self.blocks), self._width)
        flat = jnp.concatenate(
            [row[: len(part) * BLOCK] for row, part in zip(rows, self.blocks, strict=True)]
        )
        leaves, start = {}, 0
        for path, shape in self.fragment.shapes.items():
            leaves[path] = flat[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
        return leaves

    def clear_padding(self, owned: np.ndarray) -> np.ndarray:
        """Sets the elements past the fragment's end to 0; they may have got rounding errors."""
        owned[max(self.fragment.elements - self.owned.start * BLOCK, 0) :] = 0
        return owned

    def to_host(self, vector: jax.Array) -> np.ndarray:
        """Copies the blocks that this process owns: float32 [owned * BLOCK]. Waits for them."""
        shards = sorted(vector.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        parts = jax.device_get([shard.data for shard in shards])
        return np.concatenate(parts)[: len(self.owned) * BLOCK]

    def to_devices(self, owned: np.ndarray) -> jax.Array:
        """Inverts to_host, with the parts of the other processes; all of them must call it."""
        row = np.pad(owned, (0, self._width - owned.size))
        first = self.process * self._width

        def piece(index) -> np.ndarray:
            start, stop, _ = index[0].indices(self.shape[0])
            return row[start - first : stop - first]

        return jax.make_array_from_callback(self.shape, self.sharding, piece)


class Programs(NamedTuple):
    """The functions of one fragment that run on the devices; each compiles when first called.

    Attributes:
        snapshot: state -> vector of the evaluated weights, a copy: the state may be donated.
        apply: by mode, (state, vector) -> state, which is donated; see build_apply.
        flatten: {path: leaf} -> vector.
        unflatten: vector -> {path: leaf}, sharded as the parameters.
    """

    layout: DeviceLayout
    snapshot: Callable[[Any], jax.Array]
    apply: dict[str, Callable[[Any, jax.Array], Any]]
    flatten: Callable[[dict[str, jax.Array]], jax.Array]
    unflatten: Callable[[jax.Array], dict[str, jax.Array]]


def build_programs(fragment: Fragment, mesh: Mesh, shardings: Any) -> Programs:
    """Builds a fragment's functions.

    Args:
        shardings: of the whole training state.
    """
    layout = DeviceLayout(fragment, mesh)
    own = {path: x for path, x in named_leaves(shardings.params).items() if path in fragment.shapes}
    weights = lambda state: layout.flatten(eval_params(state.opt_state, state.params))
    return Programs(
        layout,
        jax.jit(weights, out_shardings=layout.sharding),
        {mode: build_apply(layout, mode, shardings) for mode in ("replace", "move", "settle")},
        jax.jit(layout.flatten, out_shardings=layout.sharding),
        jax.jit(layout.unflatten, out_shardings=own),
    )


def build_apply(layout: DeviceLayout, mode: str, shardings: Any) -> Callable:
    """Returns apply(state, vector) -> state, jitted; the state is donated.

    Where an optimizer takes gradients ahead of its iterate, the weights below are the iterate, and
    the point of the gradient moves with it.

    Args:
        mode: "replace" sets the fragment's weights to the vector, "move" adds the vector to them,
            and "settle" is "replace" for a state whose point of the gradient is to be the iterate.
        shardings: of the state.
    """

    def apply(state, vector):
        new, leaves = layout.unflatten(vector), named_leaves(state.params)
        weights = eval_params(state.opt_state, state.params)
        if mode == "replace" and weights is not state.params:
            weights = named_leaves(weights)
            # Where a weight stays, x + (leaf - x) could still round to another number than leaf.
            move = lambda x, leaf, old: jnp.where(x == old, leaf, x + (leaf - old))
            new = {path: move(x, leaves[path], weights[path]) for path, x in new.items()}
        elif mode == "move":
            new = {path: leaves[path] + x for path, x in new.items()}
        leaves |= {path: x.astype(leaves[path].dtype) for path, x in new.items()}
        treedef = jax.tree.structure(state.params)
        return state._replace(params=jax.tree.unflatten(treedef, list(leaves.values())))

    return jax.jit(apply, donate_argnums=0, out_shardings=shardings)

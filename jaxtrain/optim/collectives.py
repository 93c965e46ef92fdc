"""Collectives for all parameters at once, where XLA would run one or more for each of them."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.mesh import moment_spec, names_in, param_spec
from jaxtrain.model.trees import ArrayTree, AxesTree

TreeFunction = Callable[[AxesTree, ArrayTree], ArrayTree]


def build_replica_gather(mesh: Mesh | None) -> TreeFunction:
    """Builds gather(axes, tree): arrays sharded by `moment_spec` become sharded by `param_spec`.

    Arrays of which a device stores equally many numbers share an all-gather.
    """
    replicas = mesh.shape["replica"] if mesh else 1

    def gather(axes, tree):
        if mesh is None or replicas == 1:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        leaf_axes = treedef.flatten_up_to(axes)
        pairs = list(zip(leaf_axes, leaves, strict=True))
        split = [moment_spec(a, x.shape, mesh) for a, x in pairs]
        whole = [param_spec(a, x.shape, mesh) for a, x in pairs]
        dims = [
            next((dim for dim, entry in enumerate(spec) if "replica" in names_in(entry)), None)
            for spec in split
        ]
        moved = [i for i, dim in enumerate(dims) if dim is not None]

        def on_device(*parts):
            pools: dict = {}
            for i, x in zip(moved, parts, strict=True):
                pools.setdefault((x.size, x.dtype), []).append((i, x))
            results = {}
            for members in pools.values():
                flat = jnp.stack([x.reshape(-1) for _, x in members])
                gathered = jax.lax.all_gather(flat, "replica", axis=1)  # [members, replicas, size]
                for (i, x), y in zip(members, gathered, strict=True):
                    shape = [n * replicas if dim == dims[i] else n for dim, n in enumerate(x.shape)]
                    blocks = y.reshape(replicas, *x.shape)
                    results[i] = jnp.moveaxis(blocks, 0, dims[i]).reshape(shape)
            return tuple(results[i] for i in moved)

        mapped = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=tuple(split[i] for i in moved),
            out_specs=tuple(whole[i] for i in moved),
            check_vma=False,  # replicas have equal results, which the check cannot prove
        )
        for i, x in zip(moved, mapped(*(leaves[i] for i in moved)), strict=True):
            leaves[i] = x
        return treedef.unflatten(leaves)

    return gather


def build_mean_squares(mesh: Mesh | None) -> TreeFunction:
    """Builds mean_squares(axes, tree): each matrix's squares averaged over its inputs, as [X,1,O].

    On a mesh the matrices are sharded by `param_spec`. One all-reduce gives every device all means.
    """

    def in_place(a, x):
        return jnp.mean(jnp.square(a.to_matrices(x)), -2, keepdims=True)

    def sums_among_zeros(a, part, spec, shape, names):
        """Returns this device's share of the sums over inputs, in an array of all sums."""
        _, inputs, _ = a.split(range(len(shape)))
        kept = [dim for dim in range(len(shape)) if dim not in inputs]
        split = {name for entry in spec for name in names_in(entry)}
        copies = [jax.lax.axis_index(name) for name in names if name not in split]
        is_counted = sum(copies) == 0  # one of the devices with equal parts
        sums = jnp.where(is_counted, jnp.sum(jnp.square(part), tuple(inputs)), 0)
        index = lambda entry: jax.lax.axis_index(names_in(entry)) if entry else 0
        starts = [index(spec[dim]) * part.shape[dim] for dim in kept]
        zeros = jnp.zeros([shape[dim] for dim in kept], sums.dtype)
        return jax.lax.dynamic_update_slice(zeros, sums, starts)

    def mean_squares(axes, tree):
        if mesh is None:
            return jax.tree.map(in_place, axes, tree)
        leaves, treedef = jax.tree.flatten(tree)
        leaf_axes = treedef.flatten_up_to(axes)
        pairs = list(zip(leaf_axes, leaves, strict=True))
        specs = tuple(param_spec(a, x.shape, mesh) for a, x in pairs)
        used = {name for spec in specs for entry in spec for name in names_in(entry)}
        names = tuple(name for name in mesh.axis_names if name in used and mesh.shape[name] > 1)
        if not names:
            return jax.tree.map(in_place, axes, tree)

        def on_device(*parts):
            sums = [
                sums_among_zeros(a, part, spec, x.shape, names).reshape(-1)
                for (a, x), part, spec in zip(pairs, parts, specs, strict=True)
            ]
            ends = list(itertools.accumulate(map(len, sums)))
            return jnp.split(jax.lax.psum(jnp.concatenate(sums), names), ends[:-1])

        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        means = []
        for (a, x), sums in zip(pairs, mapped(*leaves), strict=True):
            X, I, O = a.matrix_shape(x.shape)  # noqa: E741
            means.append(sums.reshape(X, 1, O) / I)
        return treedef.unflatten(means)

    return mean_squares

"""Builds the device mesh (replica, fsdp, tensor) and gives every array its sharding on it.

Stored parameters are split: D over fsdp; heads, ffn width and vocabulary over tensor. The layer
dim L is never split, because each iteration of the scan over layers would then gather the whole
stack. Vectors are small and are replicated.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.axes import Axes
from jaxtrain.config.run_sections import MeshConfig

AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")  # mesh axes that split the batch
LETTER_AXIS = {"D": "fsdp", "H": "tensor", "G": "tensor", "F": "tensor", "V": "tensor"}


def platform() -> str:
    """Returns the platform that programs are traced for: "cpu" or "gpu".

    It is that of the default device, which may be an absent GPU that programs are compiled for.
    """
    default_device = getattr(jax.config, "jax_default_device", None)
    return getattr(default_device, "platform", None) or jax.default_backend()


def mesh_sizes(cfg: MeshConfig, devices: int) -> tuple[int, ...]:
    """Returns the sizes of the axes in AXES for a number of devices.

    Raises:
        ValueError: they do not multiply to the number of devices.
    """
    sizes = cfg.replica, cfg.fsdp, cfg.tensor
    known = math.prod(size for size in sizes if size != -1)
    sizes = tuple(devices // known if size == -1 else size for size in sizes)
    if math.prod(sizes) != devices:
        raise ValueError(
            f"mesh.replica x mesh.fsdp x mesh.tensor must equal the device count, {devices}; "
            f"got replica={cfg.replica} fsdp={cfg.fsdp} tensor={cfg.tensor}. Set one of them to -1."
        )
    return sizes


def build_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh over `devices`; by default those of all processes.

    Raises:
        ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    sizes = mesh_sizes(cfg, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_mesh(mesh: Any) -> None:
    """Raises ValueError unless this is a mesh with our axes."""
    missing = [axis for axis in AXES if axis not in getattr(mesh, "axis_names", ())]
    if missing:
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh with the axes {', '.join(AXES)}; got "
            f"{type(mesh).__name__}{getattr(mesh, 'axis_names', '')}. Use build_mesh, or give the "
            "axes these names."
        )


def check_batch(batch: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless the rows of a microbatch divide over the mesh."""
    check_mesh(mesh)
    parts = mesh.shape["replica"] * mesh.shape["fsdp"]
    if batch // accumulation % parts:
        raise ValueError(
            f"data.batch / accumulation must be a multiple of replica x fsdp = {parts}; got "
            f"data.batch={batch}, accumulation={accumulation}. Set --data.batch."
        )


def names_in(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes in an entry of a PartitionSpec: a name, several names or None."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def param_spec(
    axes: Axes, shape: Sequence[int], mesh: Mesh, over: Sequence[str] = ("fsdp", "tensor")
) -> P:
    """Returns how a parameter is split over the mesh axes in `over`.

    over=("tensor",) gives the layout in which the parameter is used, gathered over fsdp. A dim that
    a mesh axis does not divide, or whose axis already splits an earlier dim, stays whole, as does
    a dim of a letter without a mesh axis. Of the inputs, and of the outputs, only the first dim is
    split: shards of the matrix are then contiguous blocks.
    """
    if not (axes.is_matrix or "V" in axes.letters):
        return P()
    check_mesh(mesh)
    spec = [LETTER_AXIS.get(letter) for letter in axes.letters]
    _, inputs, outputs = axes.split(range(len(spec)))
    inner = *inputs[1:], *outputs[1:]
    for i, (axis, size) in enumerate(zip(spec, shape, strict=True)):
        if axis not in over or size % mesh.shape[axis] or axis in spec[:i] or i in inner:
            spec[i] = None
    return P(*spec)


def param_sharding(
    axes: Axes, shape: Sequence[int], mesh: Mesh, over: Sequence[str] = ("fsdp", "tensor")
) -> NamedSharding:
    """Returns the sharding in which a parameter and its gradient are stored."""
    return NamedSharding(mesh, param_spec(axes, shape, mesh, over))


def moment_spec(axes: Axes, shape: Sequence[int], mesh: Mesh) -> P:
    """Returns the layout of a parameter's optimizer moments.

    It is the parameter's own, except that matrices are also split over `replica`: the replicas have
    equal moments, so each stores and updates only a slice. What is split is the stack, or where its
    size does not divide, the first dim of the inputs or of the outputs, preferably the one that
    fsdp splits. This sends no more bytes: the reduce-scatter of gradients and the all-gather of
    updates are the two halves of the all-reduce that data parallelism needs anyway.
    """
    check_mesh(mesh)
    spec, replicas = [*param_spec(axes, shape, mesh)], mesh.shape["replica"]
    if not axes.is_matrix or replicas == 1:
        return P(*spec)
    stack, inputs, outputs = axes.split(range(len(spec)))
    by_fsdp = lambda dim: LETTER_AXIS.get(axes.letters[dim]) != "fsdp"
    for dim in (*stack[:1], *sorted((inputs[0], outputs[0]), key=by_fsdp)):
        names = *names_in(spec[dim]), "replica"
        if shape[dim] % math.prod(mesh.shape[name] for name in names) == 0:
            spec[dim] = names if len(names) > 1 else "replica"
            break
    return P(*spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's rows; all devices of a tensor group get the same rows."""
    check_mesh(mesh)
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device has a full copy."""
    return NamedSharding(mesh, P())

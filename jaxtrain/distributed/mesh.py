"""The device mesh (replica, fsdp, tensor), and where every array lies on it.

Parameters rest split: D over fsdp, heads, ffn and vocabulary over tensor, never L (a split stack
would be gathered whole by every layer of the scan). Vectors are small and stay whole.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.axes import Axes

AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")  # mesh axes that split the batch
LETTER_AXIS = {"D": "fsdp", "H": "tensor", "G": "tensor", "F": "tensor", "V": "tensor"}


def platform() -> str:
    """Of the device that is traced for, which may be one that is only compiled for."""
    return getattr(jax.config.jax_default_device, "platform", None) or jax.default_backend()


def build_mesh(cfg, devices=None) -> Mesh:
    """Mesh over `devices` (default: all, of all processes), from a MeshConfig.

    Raises:
        ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    sizes = [cfg.replica, cfg.fsdp, cfg.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if np.prod(sizes) != len(devices):
        asked = f"replica={cfg.replica} fsdp={cfg.fsdp} tensor={cfg.tensor}"
        raise ValueError(
            f"mesh.replica x mesh.fsdp x mesh.tensor must be the {len(devices)} devices; "
            f"got {asked}. Set one to -1, or --mesh.*."
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(batch: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless a microbatch of `batch / accumulation` rows divides the mesh."""
    parts = mesh.shape["replica"] * mesh.shape["fsdp"]
    if batch // accumulation % parts:
        raise ValueError(
            f"data.batch / accumulation must be a multiple of replica x fsdp = {parts}; got "
            f"data.batch={batch}, accumulation={accumulation}. Set --data.batch."
        )


def param_spec(axes: Axes, shape, mesh: Mesh, over=("fsdp", "tensor")) -> P:
    """Layout of a parameter over these mesh axes; over=("tensor",) is gathered for use."""
    if not (axes.is_matrix or "V" in axes.letters):
        return P()
    spec = [LETTER_AXIS.get(letter) for letter in axes.letters]
    for i, (axis, size) in enumerate(zip(spec, shape, strict=True)):
        if axis not in over or size % mesh.shape[axis] or axis in spec[:i]:
            spec[i] = None
    return P(*spec)


def param_sharding(axes: Axes, shape, mesh: Mesh, over=("fsdp", "tensor")) -> NamedSharding:
    """Where a parameter and its gradient rest."""
    return NamedSharding(mesh, param_spec(axes, shape, mesh, over))


def moment_spec(axes: Axes, shape, mesh: Mesh) -> P:
    """Layout of a parameter's moments: as it rests, and a matrix's stack over `replica` as well.

    Copies of a parameter need one copy of its moments, each replica a slice of them; its gradient
    is summed over replicas anyway, and the all-gather that returns the updates is the second half
    of what an all-reduce would send.
    """
    spec, copies = param_spec(axes, shape, mesh), mesh.shape["replica"]
    divides = axes.is_matrix and axes.stack and copies > 1 and shape[0] % copies == 0
    return P("replica", *spec[1:]) if divides else spec


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over replica and fsdp; each tensor group sees the same rows."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())

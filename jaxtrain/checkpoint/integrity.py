"""What proves that a state read back is the state that was saved: digests, and the record of them.

The 64-bit digest of an array does not depend on how the array is split. Every 32-bit word is mixed
with its place in the whole array and the results are added mod 2^32, so each device sums its own
part and the order of the sums cannot matter. For a given place the mix is a bijection: a change
within one word always shows. A swap shows but for one chance in about 2^64; a sum of words times
odd weights would miss the swap of x and -x, whose bits differ by 2^31.
"""

import functools
import hashlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.errors import CheckpointError

FORMAT = 1  # of the record; sha256 covers every field but itself, in this and in later formats
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio


def digests(arrays) -> list[str]:
    """16 hex digits for each array, in one compiled call and one transfer.

    Args:
        arrays: bool, integer or float arrays of any shape, all on the same devices.

    Raises:
        ValueError: a dtype has no bits to read, as a typed PRNG key.
    """
    for x in arrays:
        if not _has_bits(x.dtype):
            raise ValueError(
                f"a digest needs a bool, integer or float array of 8 to 64 bits; got {x.dtype}. "
                "Store jax.random.key_data(key) instead of a typed key."
            )
    if not arrays:
        return []
    meshes = [x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)]
    sums_N2 = jax.device_get(_compiled(meshes[0] if meshes else None)(list(arrays)))
    return [f"{high:08x}{low:08x}" for high, low in sums_N2.tolist()]


def _has_bits(dtype) -> bool:
    known = dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)
    return (known or jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize * 8 == _bits(dtype)


def _bits(dtype) -> int:
    if dtype == jnp.bool_:
        return 8
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


@functools.lru_cache
def _compiled(mesh):
    """The jitted digests of a list of arrays -> uint32[N,2], whole on every device of the mesh."""
    whole = NamedSharding(mesh, P()) if mesh is not None else None
    return jax.jit(lambda arrays: jnp.stack([_digest(x) for x in arrays]), out_shardings=whole)


def _digest(x):
    """[...] -> uint32[2]. Both sums in one reduction: XLA's CPU fuses nothing into two of them."""
    place = jnp.zeros(x.shape, jnp.uint32)
    for dim, stride in enumerate(_strides(x.shape)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
    first = second = jnp.zeros(x.shape, jnp.uint32)
    words = _words(x)
    for k, word in enumerate(words):
        mixed = _mix(word ^ _mix(place * jnp.uint32(len(words)) + jnp.uint32(k + 1)))
        first += mixed
        second += _mix(mixed + jnp.uint32(GOLDEN))
    zero = jnp.uint32(0)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jnp.stack(jax.lax.reduce((first, second), (zero, zero), add, tuple(range(x.ndim))))


def _words(x):
    """x's bits as one or two uint32 arrays of x's shape."""
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    if x.dtype.itemsize < 8:
        return [bits.astype(jnp.uint32)]
    return [bits.astype(jnp.uint32), (bits >> 32).astype(jnp.uint32)]


def _strides(shape):
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _mix(h):
    """A bijection of uint32 in which every input bit reaches every output bit.

    Source: Wellons 2018, "lowbias32", https://nullprogram.com/blog/2018/07/31/
    """
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def flatten_state(state) -> dict:
    """`{"params.embed.w": leaf, ...}`: what is stored does not depend on the containers' classes.

    Raises:
        ValueError: a leaf is empty, or no array nor ShapeDtypeStruct, or two share a path.
    """
    flat = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise ValueError(f"every leaf of a state must be a jax.Array; got {path}={leaf!r}.")
        if not leaf.size:  # Orbax fails halfway, and its threads then hold the exit for minutes
            raise ValueError(f"a leaf of a state must not be empty; got {path}, {describe(leaf)}.")
        if path in flat:
            raise ValueError(f"paths of a state must be unique; got {path!r} twice. Rename a key.")
        flat[path] = leaf
    return flat


def describe(leaf) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def build_record(step: int, leaves: dict, meta: dict) -> dict:
    """The JSON that rides beside the arrays, sealed by its own sha256."""
    table = {
        path: {"type": describe(leaf), "digest": digest}
        for (path, leaf), digest in zip(leaves.items(), digests(list(leaves.values())), strict=True)
    }
    record = {"format": FORMAT, "step": step, "leaves": table, "meta": meta}
    record = json.loads(json.dumps(record))
    return record | {"sha256": _seal(record)}


def _seal(record: dict) -> str:
    fields = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path) -> dict:
    """The record of one step's folder.

    Raises:
        CheckpointError: the folder is empty or lacks a file, or the record is not as written.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there")
    if not any(folder.iterdir()):
        raise CheckpointError("its folder is empty")
    for name in ("record/metadata", "state/_METADATA", "state/manifest.ocdbt"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{name} is missing")
    try:
        record = json.loads((folder / "record/metadata").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"record/metadata is not JSON that can be read: {error}") from None
    if not isinstance(record, dict) or record.get("sha256") != _seal(record):
        raise CheckpointError("record/metadata differs from its own sha256")
    if str(record["step"]) != folder.name:
        raise CheckpointError(f"its record is of step {record['step']}")
    return record


def check_format(record: dict) -> None:
    """Raises ValueError where a later version of this program wrote the record."""
    if record["format"] > FORMAT:
        raise ValueError(
            f"a checkpoint's format must be at most {FORMAT}; got format={record['format']} at "
            f"step {record['step']}. Update jaxtrain to read it."
        )


def check_template(record: dict, template: dict) -> None:
    """Raises ValueError unless the record's leaves are the template's, by path, dtype and shape."""
    stored = {path: leaf["type"] for path, leaf in record["leaves"].items()}
    asked = {path: describe(leaf) for path, leaf in template.items()}
    different = [
        f"{path}: stored {stored.get(path, 'nothing')}, asked {asked.get(path, 'nothing')}"
        for path in sorted(stored | asked)
        if stored.get(path) != asked.get(path)
    ]
    if different:
        raise ValueError(
            f"the config must describe the state of the checkpoint at step {record['step']}; got "
            f"{len(different)} leaves that differ: {'; '.join(different[:3])}"
            f"{'; ...' * (len(different) > 3)}. "
            "Set --model.* and --optim.* as in that run, or another --workdir."
        )


def check_digests(record: dict, arrays: dict) -> None:
    """Raises CheckpointError, in every process, unless each array is what the record says."""
    paths = list(arrays)
    for path, digest in zip(paths, digests([arrays[path] for path in paths]), strict=True):
        stored = record["leaves"][path]["digest"]
        if digest != stored:
            raise CheckpointError(f"{path} has digest {digest}; {stored} was saved")

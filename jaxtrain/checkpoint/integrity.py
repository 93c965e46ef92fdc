"""Checks that a restored state is the state that was saved: array checksums and their record.

Orbax 0.12 stores no checksum of an array: it restores a flipped byte without an error.

The 64-bit digest of an array does not depend on how the array is split over devices. Every 32-bit
word is mixed with its position in the whole array, and the results are added mod 2^32: each device
sums its own part, and the order of the additions cannot matter. For a given position the mix is a
bijection, so a change within one word is always detected. A swap of two words is missed with a
probability of about 2^-64; a plain sum of words times odd weights would always miss the swap of
x and -x, whose bits differ by 2^31.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.errors import CheckpointError

FORMAT = 1  # of the record; in every format sha256 covers all other fields
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio
OPTIONAL = "sites."  # prefix of leaves that only a run on several sites restores


def compute_digests(arrays: Iterable[jax.Array]) -> list[str]:
    """Returns 16 hex digits for each array, in one compiled call and one transfer.

    Args:
        arrays: bool, integer or float arrays of any shape, all on the same devices.
    """
    arrays = list(arrays)
    if not arrays:
        return []
    meshes = [x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)]
    sums_N2 = jax.device_get(_jitted_digests(meshes[0] if meshes else None)(arrays))
    return [f"{high:08x}{low:08x}" for high, low in sums_N2.tolist()]


def _has_bits(dtype: jnp.dtype) -> bool:
    """Returns whether an element's bits fill its bytes: false for int4 and typed PRNG keys."""
    is_integer = dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)
    return (is_integer or jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize * 8 == _bits(
        dtype
    )


def _bits(dtype: jnp.dtype) -> int:
    if dtype == jnp.bool_:
        return 8
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits


def _storable_form(dtype: jnp.dtype) -> str:
    """Returns what to store instead of an array x without a digest; "" if it has one."""
    if _has_bits(dtype):
        return ""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return "jax.random.key_data(key)"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "x.real and x.imag"
    if jnp.issubdtype(dtype, jnp.integer):
        return "x.astype(jnp.int8)"
    return "x.astype(jnp.float32)"


@functools.lru_cache
def _jitted_digests(mesh: Mesh | None):
    """Returns a jitted function: list of arrays -> uint32[N,2], replicated over the mesh."""
    replicated = NamedSharding(mesh, P()) if mesh is not None else None
    return jax.jit(lambda arrays: jnp.stack([_digest(x) for x in arrays]), out_shardings=replicated)


@jax.jit  # so that leaves of the same type and shape are traced once
def _digest(x: jax.Array) -> jax.Array:
    """Computes the digest of [...] as uint32 [2], without temporaries of the array's size."""
    position = jnp.zeros(x.shape, jnp.uint32)  # in the whole array, row-major
    for dim in range(x.ndim):
        stride = jnp.uint32(math.prod(x.shape[dim + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * stride
    first = second = jnp.zeros(x.shape, jnp.uint32)
    words = _words(x)
    for k, word in enumerate(words):
        mixed = _mix(word ^ _mix(position * jnp.uint32(len(words)) + jnp.uint32(k + 1)))
        first += mixed
        second += _mix(mixed + jnp.uint32(GOLDEN))
    # Both sums in one reduction: XLA on CPU would not fuse the mixing into two of them.
    zero = jnp.uint32(0)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jnp.stack(jax.lax.reduce((first, second), (zero, zero), add, tuple(range(x.ndim))))


def _words(x: jax.Array) -> list[jax.Array]:
    """Returns x's bits as one or two uint32 arrays of x's shape."""
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    if x.dtype.itemsize < 8:
        return [bits.astype(jnp.uint32)]
    return [bits.astype(jnp.uint32), (bits >> 32).astype(jnp.uint32)]


def _mix(h: jax.Array) -> jax.Array:
    """Applies a bijection of uint32 in which every input bit affects every output bit.

    Source: Wellons 2018, "lowbias32", https://nullprogram.com/blog/2018/07/31/
    """
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def flatten_state(state: Any) -> dict[str, Any]:
    """Returns `{"params.embed.w": leaf, ...}`; the containers' classes do not change the paths.

    Raises:
        ValueError: a leaf is empty, or neither array nor ShapeDtypeStruct, or its dtype has no
            bits to read; two leaves share a path; or there is none.
    """
    flat = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            shown = describe_array(leaf) if isinstance(leaf, np.ndarray) else repr(leaf)[:80]
            raise ValueError(
                f"every leaf of a state must be a jax.Array; got {path}, {type(leaf).__name__} "
                f"{shown}. Convert it with jnp.asarray, or put a number or text into meta."
            )
        # With an empty leaf Orbax fails halfway, and its threads then delay the exit for minutes.
        if not leaf.size:
            raise ValueError(
                f"a leaf of a state must not be empty; got {path}, {describe_array(leaf)}."
            )
        if form := _storable_form(leaf.dtype):
            raise ValueError(
                "a leaf of a state must be bool, integer or float, of 8 to 64 bits; got "
                f"{path}, {describe_array(leaf)}. Store {form}."
            )
        if path in flat:
            raise ValueError(f"paths of a state must be unique; got {path!r} twice. Rename a key.")
        flat[path] = leaf
    if not flat:
        raise ValueError("a state must contain an array; got none.")
    return flat


def describe_array(leaf: jax.Array | jax.ShapeDtypeStruct | np.ndarray) -> str:
    """Returns dtype and shape, such as `float32[16,32]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def check_json(value: Any, name: str) -> None:
    """Raises ValueError, with the name of the first entry, unless JSON can hold the value."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | int | float | None):
                raise ValueError(
                    f"JSON must be able to hold meta; got {name} with the key {key!r}. Use text or "
                    "a number."
                )
            check_json(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_json(item, f"{name}[{i}]")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"JSON must be able to hold meta; got {name}={value!r}. Store float(x) or int(x) of a "
            "number, and x.tolist() of an array."
        )


def build_record(step: int, leaves: dict[str, jax.Array], meta: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON that is stored beside the arrays, with its own sha256.

    Raises:
        ValueError: JSON cannot hold meta.
    """
    check_json(meta, "meta")
    table = {
        path: {"type": describe_array(leaf), "digest": digest}
        for (path, leaf), digest in zip(
            leaves.items(), compute_digests(leaves.values()), strict=True
        )
    }
    record = {"format": FORMAT, "step": step, "leaves": table, "meta": meta}
    record = json.loads(json.dumps(record))  # as it will be read: tuples become lists
    return record | {"sha256": record_hash(record)}


def record_hash(record: dict[str, Any]) -> str:
    """Returns the sha256 of every other field of a record."""
    fields = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the record in one step's folder.

    Raises:
        CheckpointError: the folder is empty or lacks a file, or the record is not as written.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist")
    if not any(folder.iterdir()):
        raise CheckpointError("its folder is empty")
    for name in ("record/metadata", "state/_METADATA", "state/manifest.ocdbt"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{name} is missing")
    try:
        record = json.loads((folder / "record/metadata").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"record/metadata is not valid JSON: {error}") from None
    if not isinstance(record, dict) or record.get("sha256") != record_hash(record):
        raise CheckpointError("record/metadata differs from its own sha256")
    if str(record["step"]) != folder.name:
        raise CheckpointError(f"its record is that of step {record['step']}")
    return record


def check_format(record: dict[str, Any]) -> None:
    """Raises ValueError if a later version of this program wrote the record."""
    if record["format"] > FORMAT:
        raise ValueError(
            f"a checkpoint's format must be at most {FORMAT}; got format={record['format']} at "
            f"step {record['step']}. Update jaxtrain to read it."
        )


def check_template(record: dict[str, Any], template: dict[str, Any]) -> None:
    """Raises ValueError unless record and template have equal leaves: path, dtype and shape.

    The record may also have leaves named `sites.`, for a reader that needs the weights only.
    """
    optional = () if any(path.startswith(OPTIONAL) for path in template) else OPTIONAL
    stored = {
        path: leaf["type"]
        for path, leaf in record["leaves"].items()
        if not optional or not path.startswith(optional)
    }
    expected = {path: describe_array(leaf) for path, leaf in template.items()}
    different = [
        f"{path}: stored {stored.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
        for path in sorted(stored | expected)
        if stored.get(path) != expected.get(path)
    ]
    if different:
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"the state must be that of the checkpoint at step {record['step']}; got "
            f"{len(different)} arrays that differ: {'; '.join(different[:3])}{more}. Build the "
            "model and optimizer that were saved (--model.*, --optim.*), or use another folder "
            "(--workdir)."
        )


def check_digests(record: dict[str, Any], arrays: dict[str, jax.Array]) -> None:
    """Raises CheckpointError, in every process, unless each array has its recorded digest."""
    for path, digest in zip(arrays, compute_digests(arrays.values()), strict=True):
        stored = record["leaves"][path]["digest"]
        if digest != stored:
            raise CheckpointError(f"{path} has digest {digest}; {stored} was saved")

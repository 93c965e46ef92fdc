"""One array of a checkpoint, as Orbax lays it out: zarr in an OCDBT store."""

from pathlib import Path

import jax
import tensorstore

from jaxtrain.checkpoint import integrity as digest


def spec(folder: Path, path: str) -> dict:
    """TensorStore's spec of a leaf in `folder`, a step's `state`."""
    base = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    return {"driver": "zarr", "kvstore": kvstore}


def why(error: Exception) -> str:
    """TensorStore's reason in at most 300 characters: its last words say what the disk said."""
    text = str(error).split(" [source locations")[0]
    return text if len(text) <= 300 else f"{text[:90]} ... {text[-200:]}"


def open_stored(folder: Path, path: str, leaf):
    """The stored array, for reading. Raises ValueError where it is not of the leaf's type."""
    wanted = spec(folder, path) | {"fill_missing_data_reads": False}
    stored = tensorstore.open(wanted, open=True, read=True).result()
    found = jax.ShapeDtypeStruct(stored.shape, stored.dtype.numpy_dtype)
    if digest.describe(found) != digest.describe(leaf):
        raise ValueError(f"stored as {digest.describe(found)}, recorded as {digest.describe(leaf)}")
    return stored

"""Opens one array of a checkpoint in the layout that Orbax writes: zarr in an OCDBT store."""

import os
import sys
from pathlib import Path

import jax
import tensorstore

from jaxtrain.checkpoint.integrity import describe_array


def spec(folder: Path, path: str) -> dict:
    """Returns TensorStore's spec of a leaf in `folder`, a step's `state`."""
    base = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    return {"driver": "zarr", "kvstore": kvstore}


def check_path(folder: Path) -> None:
    """Raises ValueError if TensorStore would name another file than Python's `open`.

    TensorStore encodes paths as UTF-8, Python as the locale asks.
    """
    folder = folder.absolute()
    name = os.fsencode(folder)
    if str(folder).encode(errors="replace") != name:
        shown, encoding = name.decode(errors="replace"), sys.getfilesystemencoding()
        raise ValueError(
            f"the path of a run must be ASCII or UTF-8; got {shown} in a locale of {encoding}. Set "
            "the environment variable PYTHONUTF8=1, or use a folder with an ASCII name."
        )


def shorten_error(error: Exception) -> str:
    """Returns TensorStore's message in at most 300 characters.

    The end is preserved, because it contains the operating system's error.
    """
    text = str(error).split(" [source locations")[0]
    return text if len(text) <= 300 else f"{text[:90]} ... {text[-200:]}"


def open_stored(folder: Path, path: str, leaf: jax.ShapeDtypeStruct) -> tensorstore.TensorStore:
    """Opens a stored array for reading.

    Raises:
        ValueError: its dtype or shape is not the leaf's.
    """
    # By default TensorStore reads a missing chunk as zeros.
    wanted = spec(folder, path) | {"fill_missing_data_reads": False}
    stored = tensorstore.open(wanted, open=True, read=True).result()
    stored_type = describe_array(jax.ShapeDtypeStruct(stored.shape, stored.dtype.numpy_dtype))
    if stored_type != describe_array(leaf):
        raise ValueError(f"stored as {stored_type}, recorded as {describe_array(leaf)}")
    return stored

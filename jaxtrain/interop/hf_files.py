"""Reads the files of a Hugging Face folder: JSON objects and safetensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtrain.interop import InteropError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FAULTS = 20  # listed in a message


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a Hugging Face folder.

    Raises:
        InteropError: the file is missing, does not contain a JSON object, or gives one field two
            different values.
    """
    try:
        value = json.loads(path.read_text(), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise InteropError(
            f"a Hugging Face folder must contain {path.name}; got none in {path.parent}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InteropError(f"{path} must contain JSON; got {error}.") from None
    if not isinstance(value, dict):
        raise InteropError(f"{path} must contain a JSON object; got {type(value).__name__}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object as a dict; json takes the last of two values silently."""
    value = dict(pairs)
    for key, x in pairs:
        if len(value) < len(pairs) and value[key] != x:
            raise ValueError(f"two values of {key}: {x!r} and {value[key]!r}")
    return value


class SafetensorsFolder:
    """The tensors of a folder by name, read one at a time.

    Raises:
        InteropError: a file is missing or truncated, or the index and the files disagree.
    """

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        if (folder / INDEX).exists():
            file_of: Any = read_json_object(folder / INDEX).get("weight_map")
            if not _is_text_map(file_of):
                raise InteropError(
                    f"{folder / INDEX} must contain a weight_map of tensors to files."
                )
        else:
            file_of = dict.fromkeys(self._open(folder / WHOLE).keys(), WHOLE)
        files = {name: self._open(folder / name) for name in sorted(set(file_of.values()))}
        absent = [name for name, file in file_of.items() if name not in files[file].keys()]
        if absent:
            raise InteropError(f"{INDEX} must name tensors that exist; got {join_faults(absent)}.")
        self._files = {name: files[file] for name, file in file_of.items()}
        self.shapes = {n: tuple(f.get_slice(n).get_shape()) for n, f in self._files.items()}
        self.dtypes = {n: f.get_slice(n).get_dtype() for n, f in self._files.items()}

    @staticmethod
    def _open(path: Path):
        try:
            return safe_open(path, framework="numpy")
        except FileNotFoundError:
            raise InteropError(
                f"weights must be in {WHOLE}, or in parts that {INDEX} lists; got no {path}."
            ) from None
        except SafetensorError as error:  # truncated, or not safetensors
            raise InteropError(
                f"{path} must be a complete safetensors file; got {error}."
            ) from None

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32, or in float64 if it is stored so."""
        x = self._files[name].get_tensor(name)
        return x if x.dtype == np.float64 else x.astype(np.float32)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for x in value.values())


def join_faults(faults: list[str]) -> str:
    """Joins the first faults for an error message."""
    more = len(faults) - MAX_FAULTS
    return "; ".join(faults[:MAX_FAULTS]) + (f"; and {more} more" if more > 0 else "")

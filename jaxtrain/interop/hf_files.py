"""Reads and writes the files of a Hugging Face folder: JSON objects and safetensors."""

import json
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxtrain.config.shell_commands import python_program
from jaxtrain.files import strict_json, write_atomic
from jaxtrain.interop import InteropError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pth", ".pt")  # files that torch.save wrote
NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt")
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
        if (folder / INDEX).exists() and not (folder / WHOLE).exists():  # as transformers chooses
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
                + _conversion(path.parent)
            ) from None
        except SafetensorError as error:  # truncated, or not safetensors
            raise InteropError(
                f"{path} must be a complete safetensors file; got {error}."
            ) from None

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32, or in float64 if it is stored so."""
        x = self._files[name].get_tensor(name)
        return x if x.dtype == np.float64 else x.astype(np.float32)


def _conversion(folder: Path) -> str:
    """Returns how to convert the PyTorch files of a folder to safetensors; empty without any."""
    files = sorted(
        path for path in folder.glob("*") if path.suffix in PICKLED and path.name not in NO_WEIGHTS
    )
    if not files:
        return ""
    code = (
        "import torch; from safetensors.torch import save_file; w = {}; "
        f"[w.update(torch.load(f, 'cpu', weights_only=True)) for f in {list(map(str, files))}]; "
        "save_file({k: x.detach().clone().contiguous() for k, x in w.items()}, "
        f"{str(folder / WHOLE)!r}, {{'format': 'pt'}})"
    )
    names = ", ".join(path.name for path in files)
    return f" Convert {names}: {python_program()} -c {shlex.quote(code)}"


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for x in value.values())


def join_faults(faults: list[str]) -> str:
    """Joins the first faults for an error message."""
    more = len(faults) - MAX_FAULTS
    return "; ".join(faults[:MAX_FAULTS]) + (f"; and {more} more" if more > 0 else "")


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file with the permissions of the config.json beside it.

    Raises:
        InteropError: the disk is full.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # written in Rust: a full disk is not an OSError
        size = sum(x.nbytes for x in tensors.values())
        raise InteropError(
            f"{path.parent.parent} must have space for {size:,} bytes; got {error}. Set --to."
        ) from None
    shutil.copymode(path.parent / "config.json", path)  # safetensors makes it private to its owner


def write_parts(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], part_bytes: int) -> None:
    """Writes one file, or files of at most part_bytes each and their index.

    The number of files is part of their names, and known only at the end.
    """
    names_of_parts, part, part_size, total = [], {}, 0, 0

    def save_part():
        names_of_parts.append(list(part))
        save_tensors(part, folder / f"part{len(names_of_parts)}")

    for name, x in tensors:
        if part and part_size + x.nbytes > part_bytes:
            save_part()
            part, part_size = {}, 0
        part[name] = x
        part_size, total = part_size + x.nbytes, total + x.nbytes
    save_part()
    if len(names_of_parts) == 1:
        (folder / "part1").rename(folder / WHOLE)
        return
    file_of = {}
    for i, names in enumerate(names_of_parts, 1):
        file = f"model-{i:05}-of-{len(names_of_parts):05}.safetensors"
        (folder / f"part{i}").rename(folder / file)
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    write_atomic(folder / INDEX, strict_json(index, indent=2) + "\n")

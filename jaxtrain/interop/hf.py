"""Reads and writes Hugging Face folders: config.json with model.safetensors, or indexed parts.

A path to a file is read as an llm.c file; a new path that ends in .bin is written as one. A file
model_STEP.pt, or a folder of them without config.json, is read as a checkpoint of nanochat.

All tensors are checked before any is loaded: those that are missing, unexpected or of another shape
are listed in one error. Writing goes to a hidden folder that is renamed when it is complete.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import ModelConfig
from jaxtrain.files import atomic_path, strict_json, write_atomic
from jaxtrain.interop import InteropError, nanochat
from jaxtrain.interop.families import (
    FAMILIES,
    Family,
    TensorMapping,
    family_of_config,
    family_of_model,
)
from jaxtrain.interop.families.family import read_model, write_config
from jaxtrain.interop.hf_files import (
    SafetensorsFolder,
    join_faults,
    read_json_object,
    write_parts,
)
from jaxtrain.interop.llmc import LlmcFile, write_llmc
from jaxtrain.interop.nanochat import NanochatCheckpoint, find_checkpoint

PART_BYTES = 5 * 10**9  # per file, as transformers splits them
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
READABLE = ("F32", "F16", "BF16", "F64")
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def read_config(folder: Path | str) -> ModelConfig:
    """Returns the model that config.json, an llm.c file or a nanochat checkpoint describes.

    Raises:
        InteropError: the file is missing, or describes what our transformer does not compute.
    """
    if path := find_checkpoint(folder):
        return NanochatCheckpoint(path).config
    if Path(folder).is_file():
        return LlmcFile(folder).config
    path = Path(folder) / "config.json"
    config = read_json_object(path)
    try:
        return read_model(family_of_config(config), config, path)
    except InteropError:
        raise
    except (ValueError, RecursionError) as error:  # of ModelConfig: values that do not fit
        raise InteropError(f"{path} must contain a model's sizes; got {error}.") from None


class _Parameter(NamedTuple):
    """One of our parameters and how a Hugging Face folder stores it."""

    tensor: TensorMapping
    axes: Axes
    shape: tuple[int, ...]

    @property
    def is_stacked(self) -> bool:
        return "L" in self.axes.stack

    @property
    def hf_names(self) -> list[str]:
        """The names of its tensors: one per layer if it is stacked."""
        layers = self.shape[0] if self.is_stacked else 1
        return [self.tensor.hf_name.format(i) for i in range(layers)]

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of one layer, inputs first; the tensor may join it with other parameters.

        Matrices have two dims, vectors one; embeddings and heads are stored as ours.
        """
        shape = self.shape[1:] if self.is_stacked else self.shape
        if self.axes.role == "matrix":
            inputs = math.prod(shape[: len(self.axes.inputs)])
            return inputs, math.prod(shape) // inputs
        return (math.prod(shape),) if self.axes.role == "vector" else shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one layer's tensor."""
        *first, last = self.part_shape
        shape = (*first, last * self.tensor.part[1])
        return shape[::-1] if self.tensor.transposed else shape


def _parameters(
    family: Family, cfg: ModelConfig, axes: dict[str, Axes], shapes: dict[str, Any]
) -> list[_Parameter]:
    """Describes every parameter of a model; axes and shapes are by our names."""
    parameters = [
        _Parameter(tensor, axes[tensor.name], shapes[tensor.name].shape)
        for tensor in family.tensors(cfg)
    ]
    unmapped = set(axes) - {parameter.tensor.name for parameter in parameters}
    assert not unmapped, f"{family.architecture} has no tensor for {sorted(unmapped)}"
    return parameters


def _count_faults(x: np.ndarray, dtype: Any) -> str:
    """Returns how many values are NaN or infinite in `dtype`; empty if none is."""
    with np.errstate(over="ignore"):
        x = x.astype(dtype, copy=False)
    if np.isfinite(x.min()) and np.isfinite(x.max()):  # NaN is the minimum of what contains it
        return ""
    nans, infinite = np.isnan(x).sum(), np.isinf(x).sum()
    return f"{nans:,} NaN and {infinite:,} infinite of {x.size:,} values in {np.dtype(dtype).name}"


def _locate_tensors(
    stored: SafetensorsFolder | LlmcFile | NanochatCheckpoint,
    parameters: list[_Parameter],
    family: Family,
    tied_to: str | None,
    dtype: Any,
) -> dict[str, str]:
    """Checks every tensor and its values; returns {Hugging Face name: name in these files}.

    Args:
        dtype: that the values must not overflow.
        tied_to: the embedding that the model's head shares; None if the head is its own.

    Raises:
        InteropError: with every fault.
    """
    # A file of the model without its head, such as GPT2Model's, has names without the prefix.
    bare = not any(name.startswith(family.prefix) for name in stored.shapes)
    stored_name = lambda name: name.removeprefix(family.prefix) if bare else name
    faults, names = [], {}
    for parameter in parameters:
        for hf_name in parameter.hf_names:
            name = stored_name(hf_name)
            expected, actual = parameter.hf_shape, stored.shapes.get(name)
            if actual is None:
                faults.append(f"{name} is missing")
            elif actual != expected:
                faults.append(f"{name} is {list(actual)}, must be {list(expected)}")
            elif stored.dtypes[name] not in READABLE:
                faults.append(f"{name} has the type {stored.dtypes[name]}")
            elif hf_name not in names and (counts := _count_faults(stored.read(name), dtype)):
                faults.append(f"{name} has {counts}")
            names[hf_name] = name
    unused = stored.shapes.keys() - set(names.values())
    if tied_to and "lm_head.weight" in unused:  # some files repeat the embedding as the head
        unused.remove("lm_head.weight")
        if not np.array_equal(stored.read("lm_head.weight"), stored.read(stored_name(tied_to))):
            faults.append("lm_head.weight is not the embedding, as tie_word_embeddings requires")
    unused = [name for name in sorted(unused) if not name.endswith(family.buffers)]
    faults += [f"{name} is unexpected" for name in unused]
    if faults:
        raise InteropError(
            f"weights must be finite, and those of the config; {join_faults(faults)}."
        )
    return names


def read_weights(
    folder: Path | str, cfg: ModelConfig, axes: dict[str, Axes], shapes: dict[str, Any]
) -> dict[str, Callable[[], np.ndarray]]:
    """Checks all tensors of a folder or file; returns {our name: function that reads it}.

    Args:
        cfg: the model that the weights are for; the folder must contain that model.
        axes, shapes: {our name: Axes} and {our name: ShapeDtypeStruct} of it.

    Raises:
        InteropError: tensors are missing, unexpected, of another shape or not finite, or a file is
            truncated.
    """
    if path := find_checkpoint(folder):
        family, stored = nanochat.FAMILY, NanochatCheckpoint(path)
    elif Path(folder).is_file():
        family, stored = FAMILIES["gpt2"], LlmcFile(folder)
    else:
        family = family_of_config(read_json_object(Path(folder) / "config.json"))
        stored = SafetensorsFolder(folder)
    parameters = _parameters(family, cfg, axes, shapes)
    mappings = family.tensors(cfg)
    tied_to = next(t.hf_name for t in mappings if t.name == "embed") if cfg.tied else None
    dtype = shapes["embed"].dtype  # of all parameters
    names = _locate_tensors(stored, parameters, family, tied_to, dtype)

    def build_reader(parameter):
        part, parts = parameter.tensor.part

        def read_layer(hf_name):
            x = stored.read(names[hf_name])
            x = x.T if parameter.tensor.transposed else x
            x = np.split(x, parts, axis=-1)[part] if parts > 1 else x
            return parameter.tensor.from_stored(x)

        def read_parameter():
            layers = np.stack([read_layer(hf_name) for hf_name in parameter.hf_names])
            return layers.reshape(parameter.shape).astype(dtype)

        return read_parameter

    return {p.tensor.name: build_reader(p) for p in parameters}


def hf_tensors(
    family: Family,
    cfg: ModelConfig,
    axes: dict[str, Axes],
    params: dict[str, Any],
    dtype: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) as Hugging Face stores them, with fused parameters joined."""
    by_tensor: dict[str, list[_Parameter]] = {}
    for parameter in _parameters(family, cfg, axes, params):
        by_tensor.setdefault(parameter.tensor.hf_name, []).append(parameter)
    for members in by_tensor.values():
        for i, name in enumerate(members[0].hf_names):
            parts = []
            for member in members:
                x = np.asarray(params[member.tensor.name])
                x = x[i] if member.is_stacked else x
                parts.append(member.tensor.to_stored(x.reshape(member.part_shape)))
            x = np.concatenate(parts, axis=-1)
            x = x.T if members[0].tensor.transposed else x
            yield name, np.ascontiguousarray(x).astype(dtype)


def write_folder(
    folder: Path | str,
    cfg: ModelConfig,
    axes: dict[str, Axes],
    params: dict[str, Any],
    dtype: str = "float32",
    verify: Callable[[Path], None] | None = None,
    part_bytes: int = PART_BYTES,
    special: dict[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers loads, or a .bin file that llm.c loads.

    Args:
        folder: must not exist; a name that ends in .bin is an llm.c file.
        axes, params: {our name: Axes} and {our name: array}.
        dtype: a key of DTYPES.
        verify: called with the complete, still hidden folder; if it raises, nothing is left behind.
        special: config.json's ids of special tokens. None writes null: a family's default would be
            an ordinary token of this vocabulary.

    Raises:
        InteropError: the folder exists, or no family computes what the model computes.
    """
    folder = Path(folder)
    family = family_of_model(cfg)
    if folder.suffix == ".bin":
        if family is not FAMILIES["gpt2"]:
            raise InteropError(f"llm.c reads only GPT-2; got {family.architecture}. Set --to.")
        tensors = dict(hf_tensors(family, cfg, axes, params, np.float32))
        return write_llmc(folder, cfg, tensors, dtype, verify)
    if folder.exists():
        raise InteropError(f"an export must go to a new folder; {folder} exists. Set --to.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder) as hidden:
        hidden.mkdir()
        config = write_config(family, cfg) | {"dtype": dtype, "torch_dtype": dtype}
        config |= NO_TOKENS | (special or {})
        write_atomic(hidden / "config.json", strict_json(config, indent=2) + "\n")
        write_parts(hidden, hf_tensors(family, cfg, axes, params, DTYPES[dtype]), part_bytes)
        if verify:
            verify(hidden)

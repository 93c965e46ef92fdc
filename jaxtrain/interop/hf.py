"""Hugging Face folders: config.json with model.safetensors, whole or in indexed parts.

A path that is a file is taken as llm.c's, a new path that ends in .bin is written as one.

Everything is checked before anything is taken: what is missing, left over or of another shape is
listed in one error. Writing goes to a hidden folder that is renamed when it is complete.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxtrain.files import atomic_path, strict_json, write_atomic
from jaxtrain.interop import InteropError
from jaxtrain.interop.families import FAMILIES, family_of_config, family_of_model
from jaxtrain.interop.llmc import LlmcFile, write_llmc

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PART_BYTES = 5 * 10**9  # of a file, as transformers splits them
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
READABLE = ("F32", "F16", "BF16", "F64")
SHOWN = 20  # faults in a message
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def json_of(path) -> dict:
    """Returns the JSON object in a file of a Hugging Face folder.

    Raises:
        InteropError: the file is missing, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InteropError(
            f"a Hugging Face folder must hold {path.name}; got none in {path.parent}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InteropError(f"{path} must hold JSON; got {error}.") from None
    if not isinstance(value, dict):
        raise InteropError(f"{path} must hold a JSON object; got {type(value).__name__}.")
    return value


def read_config(folder):
    """ModelConfig of a folder's config.json or an llm.c file's header.

    Raises:
        InteropError: the file is missing, or describes what our transformer does not compute.
    """
    if Path(folder).is_file():
        return LlmcFile(folder).config
    path = Path(folder) / "config.json"
    config = json_of(path)
    try:
        return family_of_config(config).read_config(config)
    except KeyError as error:
        raise InteropError(f"config.json must have {error}; got none in {folder}.") from None
    except InteropError:
        raise
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise InteropError(f"{path} must hold a model's sizes; got {error}.") from None


class Stored:
    """Tensors of a folder by name, read one at a time.

    Raises:
        InteropError: a file is missing or truncated, or the index and the files disagree.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if (folder / INDEX).exists():
            at = json_of(folder / INDEX).get("weight_map")
            if not isinstance(at, dict) or not all(isinstance(name, str) for name in at.values()):
                raise InteropError(f"{folder / INDEX} must hold a weight_map of tensors to files.")
        else:
            at = dict.fromkeys(self._open(folder / WHOLE).keys(), WHOLE)
        files = {name: self._open(folder / name) for name in sorted(set(at.values()))}
        absent = [name for name, file in at.items() if name not in files[file].keys()]
        if absent:
            raise InteropError(f"{INDEX} must name tensors that are there; {_listed(absent)}.")
        self._files = {name: files[file] for name, file in at.items()}
        self.shapes = {n: tuple(f.get_slice(n).get_shape()) for n, f in self._files.items()}
        self.dtypes = {n: f.get_slice(n).get_dtype() for n, f in self._files.items()}

    @staticmethod
    def _open(path):
        try:
            return safe_open(path, framework="numpy")
        except FileNotFoundError:
            raise InteropError(
                f"weights must be in {WHOLE}, or in parts by {INDEX}; {path} is not there."
            ) from None
        except SafetensorError as error:  # truncated, or no safetensors at all
            raise InteropError(f"{path} must be whole safetensors; got {error}.") from None

    def read(self, name) -> np.ndarray:
        """The tensor in float32, or float64 where it is that."""
        x = self._files[name].get_tensor(name)
        return x if x.dtype == np.float64 else x.astype(np.float32)


def _listed(faults) -> str:
    more = len(faults) - SHOWN
    return "; ".join(faults[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _names(tensor, axes, shape) -> list[str]:
    """Their names of one parameter: one for each layer where it is stacked."""
    return (
        [tensor.hf_name.format(i) for i in range(shape[0])]
        if "L" in axes.stack
        else [tensor.hf_name]
    )


def _their_shape(tensor, axes, shape) -> tuple[int, ...]:
    """Of one layer in their layout: matrices of two dims, vectors of one, tables as they are."""
    shape = shape[1:] if "L" in axes.stack else shape
    if axes.role == "matrix":
        inputs = int(np.prod(shape[: len(axes.inputs)]))
        shape = inputs, int(np.prod(shape)) // inputs
    elif axes.role == "vector":
        shape = (int(np.prod(shape)),)
    shape = (*shape[:-1], shape[-1] * tensor.part[1])
    return shape[::-1] if tensor.transposed else shape


def _check(stored, rows, family, tied_to) -> dict[str, str]:
    """{our name of a tensor of theirs: its name in the files}; lists every fault at once."""
    bare = not any(name.startswith(family.prefix) for name in stored.shapes)
    known = lambda name: name.removeprefix(family.prefix) if bare else name
    faults, at = [], {}
    for tensor, axes, shape in rows:
        for name in _names(tensor, axes, shape):
            at[name] = known(name)
            expected, found = _their_shape(tensor, axes, shape), stored.shapes.get(at[name])
            if found is None:
                faults.append(f"{at[name]} is missing")
            elif found != expected:
                faults.append(f"{at[name]} is {list(found)}, must be {list(expected)}")
            elif stored.dtypes[at[name]] not in READABLE:
                faults.append(f"{at[name]} is of {stored.dtypes[at[name]]}")
    spare = stored.shapes.keys() - set(at.values())
    if tied_to and "lm_head.weight" in spare:  # written beside the embedding that it shares
        spare.remove("lm_head.weight")
        if not np.array_equal(stored.read("lm_head.weight"), stored.read(known(tied_to))):
            faults.append("lm_head.weight is not the embedding that tie_word_embeddings says it is")
    faults += [f"{n} is left over" for n in sorted(spare) if not n.endswith(family.buffers)]
    if faults:
        raise InteropError(f"weights must be those of config.json; {_listed(faults)}.")
    return at


def _rows(family, cfg, axes, shapes):
    """[(TensorMapping, Axes, shape)] of every parameter; axes and shapes by name."""
    rows = [(t, axes[t.name], shapes[t.name].shape) for t in family.tensors(cfg)]
    unnamed = set(axes) - {t.name for t, _, _ in rows}
    assert not unnamed, f"no tensor of theirs for {sorted(unnamed)}"
    return rows


def read_weights(folder, cfg, axes, shapes) -> dict[str, Callable]:
    """{our parameter's name: () -> array} of a folder, after every tensor's name and shape is seen.

    Args:
        cfg: ModelConfig of the model that the weights are for; the folder must hold that model.
        axes, shapes: {name: Axes} and {name: ShapeDtypeStruct} of it.

    Raises:
        InteropError: tensors are missing, left over or of another shape, or a file is truncated.
    """
    if Path(folder).is_file():
        family, stored = FAMILIES["gpt2"], LlmcFile(folder)
    else:
        family, stored = family_of_config(json_of(Path(folder) / "config.json")), Stored(folder)
    rows = _rows(family, cfg, axes, shapes)
    tied_to = next(t.hf_name for t, _, _ in rows if t.name == "embed") if cfg.tied else None
    at = _check(stored, rows, family, tied_to)

    def reader(tensor, a, shape, dtype):
        def one(name):
            x = stored.read(at[name])
            x = x.T if tensor.transposed else x
            index, count = tensor.part
            return np.split(x, count, axis=-1)[index] if count > 1 else x

        names = _names(tensor, a, shape)
        return lambda: np.stack([one(name) for name in names]).reshape(shape).astype(dtype)

    return {t.name: reader(t, a, shape, shapes[t.name].dtype) for t, a, shape in rows}


def their_tensors(family, cfg, axes, params, dtype):
    """Yields (name, array) in their layout, fused parts joined."""
    rows = _rows(family, cfg, axes, params)
    groups = {}
    for row in rows:
        groups.setdefault(row[0].hf_name, []).append(row)
    for members in groups.values():
        tensor, a, shape = members[0]
        for i, name in enumerate(_names(tensor, a, shape)):
            parts = []
            for t, a, shape in members:
                x = np.asarray(params[t.name])
                x = x[i] if "L" in a.stack else x
                single = _their_shape(t._replace(part=(0, 1), transposed=False), a, shape)
                parts.append(x.reshape(single))
            x = np.concatenate(parts, axis=-1)
            yield name, np.ascontiguousarray(x.T if tensor.transposed else x).astype(dtype)


def write_folder(
    folder, cfg, axes, params, dtype="float32", verify=None, part_bytes=PART_BYTES, special=None
):
    """Writes a Hugging Face folder that transformers loads, or a .bin file that llm.c does.

    Args:
        folder: must not exist; a name that ends in .bin is llm.c's file.
        axes, params: {name: Axes} and {name: array}.
        dtype: a key of DTYPES.
        verify: called with the complete, still hidden folder; what it raises leaves nothing behind.
        special: config.json's ids of special tokens; None writes null, for a family's default would
            be an ordinary token of this vocabulary.

    Raises:
        InteropError: the folder exists, or no family computes what the model computes.
    """
    folder = Path(folder)
    family = family_of_model(cfg)
    if folder.suffix == ".bin":
        if family is not FAMILIES["gpt2"]:
            raise InteropError(f"llm.c's files hold GPT-2; got {family.architecture}. Set --to.")
        tensors = dict(their_tensors(family, cfg, axes, params, np.float32))
        return write_llmc(folder, cfg, tensors, dtype, verify)
    if folder.exists():
        raise InteropError(f"an export must go to a new folder; {folder} is there. Set --to.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder) as hidden:
        hidden.mkdir()
        config = family.write_config(cfg) | {"dtype": dtype, "torch_dtype": dtype}
        config |= NO_TOKENS | (special or {})
        write_atomic(hidden / "config.json", strict_json(config, indent=2) + "\n")
        _write_parts(hidden, their_tensors(family, cfg, axes, params, DTYPES[dtype]), part_bytes)
        if verify:
            verify(hidden)


def _save(tensors, path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what writes it is Rust: no OSError on a full disk
        size = sum(x.nbytes for x in tensors.values())
        raise InteropError(
            f"{path.parent.parent} must take {size:,} bytes of weights; got {error}. Set --to."
        ) from None
    shutil.copymode(path.parent / "config.json", path)  # safetensors lets only the owner read


def _write_parts(folder, tensors, part_bytes) -> None:
    """One file, or files of at most part_bytes each and their index."""
    parts, held = [{}], 0
    where, total = {}, 0
    for name, x in tensors:
        if held and held + x.nbytes > part_bytes:
            _save(parts[-1], folder / f"part{len(parts)}")
            parts[-1] = dict.fromkeys(parts[-1])
            parts.append({})
            held = 0
        parts[-1][name] = x
        held, total = held + x.nbytes, total + x.nbytes
    if len(parts) == 1:
        _save(parts[0], folder / WHOLE)
        return
    _save(parts[-1], folder / f"part{len(parts)}")
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        (folder / f"part{i}").rename(folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_atomic(folder / INDEX, strict_json(index, indent=2) + "\n")

"""Reads and writes llm.c's model files: a header of 256 int32, then the tensors, by kind and layer.

Matrices are stored outputs first, and the vocabulary is padded to a multiple of 128.

Source: Karpathy et al., https://github.com/karpathy/llm.c, train_gpt2.py, `write_model`
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.files import atomic_path
from jaxtrain.interop import InteropError

MAGIC = 20240326
HEADER = 256  # int32 numbers
VERSIONS = {3: np.dtype(np.float32), 5: np.dtype(jnp.bfloat16)}
PADDED_TO = 128
TORCH_SAVE = (b"PK", b"\x80\x02")  # a zip archive; a pickle, before torch 1.6
EPS = 1e-5  # of the layer norms
# Hugging Face's name -> dims: T positions, C width, P the padded vocabulary, A = 3C, F = 4C.
LAYOUT = {
    "transformer.wte.weight": "PC",
    "transformer.wpe.weight": "TC",
    "transformer.h.{}.ln_1.weight": "C",
    "transformer.h.{}.ln_1.bias": "C",
    "transformer.h.{}.attn.c_attn.weight": "AC",
    "transformer.h.{}.attn.c_attn.bias": "A",
    "transformer.h.{}.attn.c_proj.weight": "CC",
    "transformer.h.{}.attn.c_proj.bias": "C",
    "transformer.h.{}.ln_2.weight": "C",
    "transformer.h.{}.ln_2.bias": "C",
    "transformer.h.{}.mlp.c_fc.weight": "FC",
    "transformer.h.{}.mlp.c_fc.bias": "F",
    "transformer.h.{}.mlp.c_proj.weight": "CF",
    "transformer.h.{}.mlp.c_proj.bias": "C",
    "transformer.ln_f.weight": "C",
    "transformer.ln_f.bias": "C",
}


def padded_vocab_size(V: int) -> int:
    """Returns the rows of the vocabulary in a file."""
    return -(-V // PADDED_TO) * PADDED_TO


def file_layout(T: int, L: int, C: int, P: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yields (name, shape in the file, whether Hugging Face's is transposed), in file order."""
    sizes = {"T": T, "P": P, "C": C, "A": 3 * C, "F": 4 * C}
    for name, dims in LAYOUT.items():
        shape, stacked = tuple(sizes[d] for d in dims), "{}" in name
        for i in range(L if stacked else 1):
            yield name.format(i), shape, stacked and len(shape) == 2


class LlmcFile:
    """The tensors of a file by Hugging Face's names and shapes, read one at a time.

    Raises:
        InteropError: the file is not an llm.c model of a known version, or has the wrong length.
    """

    def __init__(self, path: Path | str):
        head = np.fromfile(path, "<i4", HEADER)
        if len(head) < HEADER or head[0] != MAGIC:
            is_pickled = head[:1].tobytes().startswith(TORCH_SAVE)
            advice = " torch.save wrote it: set --from to its folder." if is_pickled else ""
            raise InteropError(
                f"an llm.c model must start with {MAGIC}; got {head[:1]} in {path}.{advice}"
            )
        if head[1] not in VERSIONS:
            raise InteropError(
                f"an llm.c model must be of version 3 (float32) or 5 (bfloat16); got {head[1]} in "
                f"{path}."
            )
        T, V, L, H, C, P = (int(n) for n in head[2:8])
        if min(T, V, L, H, C) < 1 or P < V or C % H:
            raise InteropError(
                f"an llm.c header must have sizes that fit each other; got T={T} V={V} L={L} "
                f"heads={H} C={C} padded V={P} in {path}."
            )
        self.config = gpt2_config(L=L, D=C, H=H, V=V, positions=T)
        self._type, self._layout, offset = VERSIONS[int(head[1])], {}, 4 * HEADER
        for name, shape, transposed in file_layout(T, L, C, P):
            self._layout[name] = offset, shape, transposed
            offset += math.prod(shape) * self._type.itemsize
        if Path(path).stat().st_size != offset:
            raise InteropError(
                f"{path} must have {offset:,} bytes by its header; got "
                f"{Path(path).stat().st_size:,}."
            )
        self.shapes = {
            n: s[::-1] if transposed else s for n, (_, s, transposed) in self._layout.items()
        }
        self.shapes["transformer.wte.weight"] = V, C
        self.dtypes = dict.fromkeys(self._layout, {3: "F32", 5: "BF16"}[int(head[1])])
        self._data = np.memmap(path, np.uint8, "r")

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32, without the padding."""
        offset, shape, transposed = self._layout[name]
        raw = self._data[offset : offset + math.prod(shape) * self._type.itemsize]
        x = np.frombuffer(raw, self._type).reshape(shape).astype(np.float32)
        return (x.T if transposed else x)[: self.shapes[name][0]]


def gpt2_config(L: int, D: int, H: int, V: int, positions: int) -> ModelConfig:
    """Returns the config of llm.c's GPT-2."""
    return ModelConfig(
        L=L,
        D=D,
        H=H,
        G=H,
        K=D // H,
        F=4 * D,
        V=V,
        norm="layer",
        norm_eps=EPS,
        position="learned",
        positions=positions,
        mlp="gelu",
        bias=True,
        tied=True,
        dtype="float32",
    )


def write_llmc(
    path: Path | str,
    cfg: ModelConfig,
    tensors: dict[str, np.ndarray],
    dtype: str = "float32",
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Writes a file that llm.c loads, completely or not at all.

    Args:
        path: must not exist.
        tensors: {Hugging Face's name: array} of a GPT-2.
        dtype: float32 or bfloat16.
        verify: called with the complete, still hidden file; if it raises, nothing is left behind.

    Raises:
        InteropError: the file exists, or llm.c does not have the model or the dtype.
    """
    path, versions = Path(path), {kind.name: version for version, kind in VERSIONS.items()}
    if path.exists():
        raise InteropError(f"an export must go to a new file; {path} exists. Set --to.")
    if dtype not in versions:
        raise InteropError(f"llm.c's files are float32 or bfloat16; got {dtype}. Set --dtype.")
    if cfg.F != 4 * cfg.D or not cfg.tied or cfg.norm_eps != EPS:
        raise InteropError(
            f"llm.c's GPT-2 must have F = 4 D, a tied head and norm_eps {EPS}; got "
            f"model.F={cfg.F}, model.D={cfg.D}, model.tied={cfg.tied}, model.norm_eps="
            f"{cfg.norm_eps}. Export a Hugging Face folder instead."
        )
    P = padded_vocab_size(cfg.V)
    head = np.zeros(HEADER, "<i4")
    head[:8] = MAGIC, versions[dtype], cfg.positions, cfg.V, cfg.L, cfg.H, cfg.D, P
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as hidden:
        with open(hidden, "xb") as file:
            file.write(head.tobytes())
            for name, shape, transposed in file_layout(cfg.positions, cfg.L, cfg.D, P):
                x = tensors[name].T if transposed else tensors[name]
                padding = [(0, shape[0] - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
                file.write(np.pad(x, padding).astype(VERSIONS[versions[dtype]]).tobytes())
        if verify:
            verify(hidden)

"""Reads checkpoints that nanochat writes: model_STEP.pt, with the model's sizes in meta_STEP.json.

Only the architecture of October 2025 is read. Later ones have further tensors (such as value
embeddings and residual lambdas) and further sizes (such as window_pattern), which are refused by
name. nanochat rounds RoPE's tables to bfloat16; transformers' version of it and jaxtrain do not.

Source: Karpathy 2025, https://github.com/karpathy/nanochat, nanochat/gpt.py and
    checkpoint_manager.py
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.config.train_config import ModelConfig
from jaxtrain.interop import InteropError
from jaxtrain.interop.families import FAMILIES
from jaxtrain.interop.families.config_reader import SIZE, ConfigReader
from jaxtrain.interop.families.family import TensorMapping
from jaxtrain.interop.hf_files import join_faults, read_json_object

MODEL_FILE = re.compile(r"model_(\d+)\.pt")
ARCHITECTURE = "nanochat's architecture of October 2025"
NORM_EPS = float(np.finfo(np.float32).eps)  # torch's rms_norm without eps, in bfloat16 too
SOFTCAP = 15.0
SIZES = {
    "n_layer": "L",
    "n_embd": "D",
    "n_head": "H",
    "n_kv_head": "G",
    "vocab_size": "V",
    "sequence_len": "positions",
}
# Parts of names: transformers' version of nanochat -> nanochat's own.
NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    **{f"self_attn.{letter}_proj": f"attn.c_{letter}" for letter in "qkv"},
}
COMPILED = "_orig_mod."  # that torch.compile puts before each name
DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def find_checkpoint(source: Path | str) -> Path | None:
    """Returns the model file that a path names, or the newest in a folder; None if there is none.

    A folder with a config.json is one of Hugging Face.
    """
    source = Path(source)
    if source.is_file():
        return source if MODEL_FILE.fullmatch(source.name) else None
    if (source / "config.json").exists():
        return None
    steps = {int(m[1]): p for p in source.glob("*.pt") if (m := MODEL_FILE.fullmatch(p.name))}
    return steps[max(steps)] if steps else None


def _tensors(cfg: ModelConfig) -> Iterator[TensorMapping]:
    for tensor in FAMILIES["nanochat"].tensors(cfg):
        name = tensor.hf_name
        for theirs, own in NAMES.items():
            name = name.replace(theirs, own)
        yield tensor._replace(hf_name=name)


FAMILY = dataclasses.replace(FAMILIES["nanochat"], tensors=_tensors, prefix="transformer.")


class NanochatCheckpoint:
    """The tensors of a checkpoint by nanochat's names, read one at a time.

    Raises:
        InteropError: the model is of another architecture, a file is damaged, or torch is missing.
    """

    def __init__(self, path: Path):
        self._weights = {k.removeprefix(COMPILED): x for k, x in _load(path).items()}
        meta = path.with_name(path.name.replace("model_", "meta_")).with_suffix(".json")
        self.config = self._read_config(meta)
        self.shapes = {name: tuple(x.shape) for name, x in self._weights.items()}
        self.dtypes = {n: DTYPES.get(str(x.dtype), str(x.dtype)) for n, x in self._weights.items()}

    def _read_config(self, meta: Path) -> ModelConfig:
        if not meta.is_file():
            raise InteropError(
                f"a nanochat checkpoint must have its sizes in {meta}; it is missing."
            )
        sizes = read_json_object(meta).get("model_config")
        if not isinstance(sizes, dict):
            raise InteropError(f"{meta} must contain model_config, an object; got {sizes!r}.")
        reader = ConfigReader(sizes)
        values: dict[str, Any] = {
            ours: reader.take(name, kind=SIZE) for name, ours in SIZES.items()
        }
        if values["D"] % values["H"]:
            reader.faults.append(f"n_embd={values['D']} (must be a multiple of n_head)")
        fixed = {k: x for k, x in FAMILY.requires.items() if not callable(x)}
        cfg = ModelConfig(
            **(values | fixed),
            K=values["D"] // values["H"] or 1,
            F=4 * values["D"],
            norm_eps=NORM_EPS,
            logit_softcap=SOFTCAP,
            dtype="float32",
        )
        known = {t.hf_name.format(i) for t in _tensors(cfg) for i in range(cfg.L)}
        if others := sorted(self._weights.keys() - known):
            reader.faults.append(f"the tensors {join_faults(others)}")
        reader.finish(ARCHITECTURE, meta)
        return cfg

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32."""
        return self._weights[name].float().numpy()


def _load(path: Path) -> dict[str, Any]:
    """Returns the tensors of a file of torch.save, mapped into memory.

    Raises:
        InteropError: torch is missing, or the file is damaged.
    """
    try:
        import torch
    except ImportError as error:
        raise InteropError(
            f'{path} is read with torch, which is missing. Run pip install "jaxtrain[crosscheck]".'
        ) from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several types for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InteropError(f"{path} must be a complete file of torch.save; got {reason}.") from None
    if not isinstance(weights, dict) or not all(torch.is_tensor(x) for x in weights.values()):
        raise InteropError(f"{path} must contain named tensors; got {type(weights).__name__}.")
    return weights

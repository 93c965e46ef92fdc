"""Verifies an export by reading it back with our own reader, then with transformers.

Logits are compared in float32 whatever dtype the run computed in: bfloat16 rounds differently in
each framework, and the difference would hide a wrong weight.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import ModelConfig
from jaxtrain.data.tokenizer import Tokenizer
from jaxtrain.interop import InteropError
from jaxtrain.interop.families import family_of_model
from jaxtrain.interop.hf import DTYPES, read_config, read_weights
from jaxtrain.interop.hf_files import read_json_object
from jaxtrain.interop.hf_tokenizer import FILE, SAMPLES
from jaxtrain.interop.initial_state import check_model
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.routes import choose_routes

CHECK_TOKENS = 32  # of a random sequence
LONGEST_WINDOW = 1_024  # that the sequence exceeds; reference attention stores [H,T,T]
RTOL = 1e-5  # of the largest logit
# Frameworks add in different orders, and a deep or badly scaled model amplifies the rounding. It
# amplifies a change of each weight's last bit as much: over six models of 2 to 48 layers the gap to
# transformers was 0.3 to 2 times the effect of such a change, whether that was 1e-6 or 0.3
# (jax 0.10.2, CPU). Up to ROUNDINGS times the effect is accepted.
ROUNDINGS = 4
INSTALL = "pip install torch transformers"


def reference_logits(cfg: ModelConfig, params: dict[str, Any], tokens_BT: np.ndarray) -> np.ndarray:
    """Computes a model's logits [B,T,V] in float64 if that is its dtype, else in float32."""
    dtype = cfg.dtype if cfg.dtype == "float64" else "float32"
    cfg = dataclasses.replace(cfg, dtype=dtype, attention="reference", remat="none")
    model = build_model(cfg, choose_routes(cfg, False, jax.default_backend(), False))
    structure = jax.tree.structure(model.shapes)
    tree = jax.tree.unflatten(structure, [params[name] for name in named_leaves(model.shapes)])
    with jax.default_matmul_precision("highest"):  # otherwise a GPU uses TF32
        return np.asarray(jax.jit(lambda p: model.logits(p, model.apply(p, tokens_BT)))(tree))


def check_tokens(cfg: ModelConfig) -> np.ndarray:
    """Returns the random sequence [1,T] whose logits are compared; it exceeds a short window."""
    window = cfg.window if cfg.window <= LONGEST_WINDOW else 0
    length = min(window + CHECK_TOKENS, cfg.positions)
    return np.random.default_rng(0).integers(0, cfg.V, (1, length))


def _rounded(x: Any, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(DTYPES[dtype])


def check_finite(params: dict[str, Any], dtype: str) -> None:
    """Raises InteropError if weights are not finite, or overflow in `dtype`, a key of DTYPES."""
    wrong = [name for name, x in params.items() if not np.isfinite(_rounded(x, dtype)).all()]
    if wrong:
        raise InteropError(
            f"weights must be finite in {dtype}; got NaN or infinity in {len(wrong)} tensor(s), as "
            f"in {wrong[0]}. Set --dtype=float32, or --step to an earlier checkpoint."
        )


class Reference(NamedTuple):
    """A model's logits of check_tokens."""

    logits_BTV: np.ndarray
    rounding: float  # relative_gap() after a change of each weight's last bit

    def relative_gap(self, others_BTV: np.ndarray) -> float:
        """Returns the largest difference, relative to the largest logit."""
        highest = float(np.max(np.abs(self.logits_BTV)))
        return float(np.max(np.abs(self.logits_BTV - others_BTV))) / (highest or 1.0)


def check_reading(
    source: Path | str,
    cfg: ModelConfig,
    axes: dict[str, Axes],
    params: dict[str, Any],
    dtype: str,
) -> Reference:
    """Reads an export back, compares config, weights and logits, and returns the logits.

    Args:
        source: Hugging Face folder or llm.c file.
        cfg, axes, params: of the exported model; {name: Axes} and {name: array}.
        dtype: a key of DTYPES, to which the weights were rounded.

    Raises:
        InteropError: what was read back differs from what was exported.
    """
    check_model(cfg, source)
    exported = {}
    for tensor in family_of_model(cfg).tensors(cfg):
        x = np.asarray(params[tensor.name])
        stored = _rounded(tensor.to_stored(x), dtype)
        exported[tensor.name] = tensor.from_stored(stored.astype(x.dtype))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in exported.items()}
    read = {name: load() for name, load in read_weights(source, cfg, axes, shapes).items()}
    wrong = [name for name, x in exported.items() if not np.array_equal(x, read[name])]
    if wrong:
        raise InteropError(f"an export must have the run's weights; {', '.join(wrong[:4])} differ.")
    tokens = check_tokens(cfg)
    read_cfg = dataclasses.replace(read_config(source), dtype=cfg.dtype)
    logits = reference_logits(cfg, exported, tokens)
    read_logits = reference_logits(read_cfg, read, tokens)
    if not np.array_equal(logits, read_logits):
        gap = float(np.max(np.abs(logits - read_logits)))
        raise InteropError(f"an export must compute what the run does; logits are {gap:.3g} off.")
    rng = np.random.default_rng(1)
    change_last_bit = lambda x: x * (1 + 2.0**-23 * rng.choice((-1, 1), x.shape)).astype(x.dtype)
    changed = {name: change_last_bit(x) for name, x in exported.items()}
    exact = Reference(logits, 0.0)
    return exact._replace(rounding=exact.relative_gap(reference_logits(cfg, changed, tokens)))


def check_transformers(
    folder: Path, cfg: ModelConfig, reference: Reference, tokenizer: Tokenizer | None = None
) -> str:
    """Loads a Hugging Face folder with transformers, and returns what was compared.

    Args:
        reference: from check_reading.
        tokenizer: the run's, if its files were exported.

    Raises:
        InteropError: transformers cannot load the folder, or computes something else.
    """
    try:
        import torch
        import transformers
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or broken
        return f"not checked with transformers ({error}). Install it: {INSTALL}"
    version = transformers.__version__
    [name] = read_json_object(folder / "config.json")["architectures"]
    if not hasattr(transformers, name):
        return f"not checked with transformers: {version} has no {name}"
    with _quiet(transformers):
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
            model, report = loaded
            with torch.no_grad():
                theirs_BTV = model.eval()(torch.from_numpy(check_tokens(cfg))).logits.numpy()
            if tokenizer is not None:
                load = transformers.AutoTokenizer.from_pretrained
                _compare_ids(load(folder, local_files_only=True), tokenizer)
        except InteropError:
            raise
        except Exception as error:  # another project's code may raise anything
            raise InteropError(
                f"transformers {version} must load the export; got {type(error).__name__}: {error}"
            ) from error
    unused = [k for kind in ("missing_keys", "unexpected_keys") for k in report[kind]]
    if unused:
        raise InteropError(f"transformers {version} must use every tensor; got {unused[:4]}.")
    gap, allowed = reference.relative_gap(theirs_BTV), max(RTOL, ROUNDINGS * reference.rounding)
    if not gap <= allowed:  # NaN fails too
        raise InteropError(
            f"transformers {version} must compute the run's logits; they differ by {gap:.1e} of "
            f"the largest, and rounding explains at most {allowed:.1e}."
        )
    difference = f"{gap:.0e} of the largest apart; rounding explains {reference.rounding:.0e}"
    ids = " and gives the same token ids" if tokenizer is not None else ""
    return (
        f"checked: transformers {version} loads it as {type(model).__name__}, computes the same "
        f"logits in float32 ({difference}){ids}"
    )


def _compare_ids(exported: Any, tokenizer: Tokenizer) -> None:
    """Raises InteropError if AutoTokenizer's ids of SAMPLES are not the run's."""
    for sample in SAMPLES:
        ids, expected = exported(sample).input_ids, [tokenizer.eot, *tokenizer.encode(sample)]
        if list(ids) != expected:
            raise InteropError(
                f"AutoTokenizer must give the ids of the run's tokenizer {tokenizer.name}; got "
                f"{ids[:8]}..., not {expected[:8]}..., for {sample!r}. Set --tokenizer=none to "
                f"export without {FILE}."
            )


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Hides transformers' progress bars and advice."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()

"""Checks of an export before it is called done: our own reader, then transformers.

Logits are compared in float32 whatever the run computed in: bfloat16 rounds differently in each
framework, and would hide a wrong weight.
"""

import contextlib
import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxtrain.interop import InteropError
from jaxtrain.interop.hf import DTYPES, json_of, read_config, read_weights
from jaxtrain.interop.start import check_model
from jaxtrain.interop.tokenizer import FILE, SAMPLES
from jaxtrain.model.transformer import build_model
from jaxtrain.model.trees import named_leaves
from jaxtrain.ops.routes import choose_routes

CHECK_TOKENS = 32  # of a random sequence
RTOL = 1e-5  # of the largest logit
# Frameworks round in other orders, which a deep or badly scaled model amplifies. A change of each
# weight by its last bit is amplified alike: over six models of 2 to 48 layers the gap to
# transformers was 0.3 to 2 times what that makes, whether it was 1e-6 or 0.3 (jax 0.10.2, CPU).
ROUNDINGS = 4
INSTALL = "pip install torch transformers"


def reference_logits(cfg, params, tokens_BT) -> np.ndarray:
    """Returns the logits [B,T,V] of a ModelConfig's model, in float32 or, if it is that, float64.

    Args:
        params: {name: array}.
    """
    dtype = cfg.dtype if cfg.dtype == "float64" else "float32"
    cfg = dataclasses.replace(cfg, dtype=dtype, attention="reference", remat="none")
    model = build_model(cfg, choose_routes(cfg, False, jax.default_backend(), False))
    structure = jax.tree.structure(model.shapes)
    tree = jax.tree.unflatten(structure, [params[name] for name in named_leaves(model.shapes)])
    with jax.default_matmul_precision("highest"):  # not a GPU's TF32
        return np.asarray(jax.jit(lambda p: model.logits(p, model.apply(p, tokens_BT)))(tree))


def check_tokens(cfg) -> np.ndarray:
    """Returns the random sequence [1,T] that an export is computed with."""
    length = min(CHECK_TOKENS, cfg.positions)
    return np.random.default_rng(0).integers(0, cfg.V, (1, length))


def _rounded(x, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(DTYPES[dtype])


def check_finite(params, dtype) -> None:
    """Raises InteropError where a type cannot hold the weights, or they are not finite at all.

    Args:
        params: {name: array}.
        dtype: a key of DTYPES.
    """
    wrong = [name for name, x in params.items() if not np.isfinite(_rounded(x, dtype)).all()]
    if wrong:
        raise InteropError(
            f"weights must be finite in {dtype}; got NaN or infinity in {len(wrong)} tensor(s), as "
            f"in {wrong[0]}. Set --dtype=float32, or --step to an earlier checkpoint."
        )


class Reference(NamedTuple):
    """What a model computes of check_tokens."""

    logits_BTV: np.ndarray
    rounding: float  # of the largest logit: what the last bit of each weight changes

    def apart(self, others_BTV) -> float:
        """Returns the largest difference, of the largest logit."""
        highest = float(np.max(np.abs(self.logits_BTV)))
        return float(np.max(np.abs(self.logits_BTV - others_BTV))) / (highest or 1.0)


def check_reading(source, cfg, axes, params, dtype) -> Reference:
    """Reads an export back, config and weights, and returns what the model computes.

    Args:
        source: Hugging Face folder or llm.c file.
        cfg, axes, params: ModelConfig, {name: Axes} and {name: array} of what was exported.
        dtype: a key of DTYPES, that the weights were rounded to.

    Raises:
        InteropError: what is read back is not what was exported.
    """
    check_model(cfg, source)
    kept = {name: _rounded(x, dtype).astype(x.dtype) for name, x in params.items()}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in kept.items()}
    read = {name: load() for name, load in read_weights(source, cfg, axes, shapes).items()}
    wrong = [name for name, x in kept.items() if not np.array_equal(x, read[name])]
    if wrong:
        raise InteropError(f"an export must hold the run's weights; {', '.join(wrong[:4])} differ.")
    tokens = check_tokens(cfg)
    theirs = dataclasses.replace(read_config(source), dtype=cfg.dtype)
    ours, back = reference_logits(cfg, kept, tokens), reference_logits(theirs, read, tokens)
    if not np.array_equal(ours, back):
        off = float(np.max(np.abs(ours - back)))
        raise InteropError(f"an export must compute what the run does; logits are {off:.3g} off.")
    signs = np.random.default_rng(1)
    last_bit = lambda x: x * (1 + 2.0**-23 * signs.choice((-1, 1), x.shape)).astype(x.dtype)
    nudged = reference_logits(cfg, {name: last_bit(x) for name, x in kept.items()}, tokens)
    exact = Reference(ours, 0.0)
    return exact._replace(rounding=exact.apart(nudged))


def check_transformers(folder, cfg, reference, tokenizer=None) -> str:
    """Loads a Hugging Face folder with transformers, compares it, and returns what was compared.

    Args:
        reference: from check_reading.
        tokenizer: the run's, if its files were written.

    Raises:
        InteropError: transformers cannot load the folder, or computes something else.
    """
    try:
        import torch
        import transformers
    except (ImportError, OSError, RuntimeError) as error:  # missing, or broken
        return f"not checked: transformers' reading of it ({error}). {INSTALL} lets it be checked"
    version, name = transformers.__version__, json_of(folder / "config.json")["architectures"][0]
    if not hasattr(transformers, name):
        return f"not checked: transformers' reading of it ({version} has no {name})"
    with _quiet(transformers):
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
            with torch.no_grad():
                theirs_BTV = model.eval()(torch.from_numpy(check_tokens(cfg))).logits.numpy()
            if tokenizer is not None:
                load = transformers.AutoTokenizer.from_pretrained
                _compare_ids(load(folder, local_files_only=True), tokenizer)
        except InteropError:
            raise
        except Exception as error:  # of another project: anything
            raise InteropError(
                f"transformers {version} must load the export; got {type(error).__name__}: {error}"
            ) from error
    unused = [k for kind in ("missing_keys", "unexpected_keys") for k in report[kind]]
    if unused:
        raise InteropError(f"transformers {version} must use every tensor; got {unused[:4]}.")
    off, allowed = reference.apart(theirs_BTV), max(RTOL, ROUNDINGS * reference.rounding)
    if not off <= allowed:
        raise InteropError(
            f"transformers {version} must compute the run's logits; they are {off:.1e} of the "
            f"largest apart, at most {allowed:.1e} is rounding."
        )
    gap = f"{off:.0e} of the largest apart, rounding makes {reference.rounding:.0e}"
    ids = " and gives the same token ids" if tokenizer is not None else ""
    return (
        f"checked: transformers {version} loads it as {type(model).__name__}, computes the same "
        f"logits in float32 ({gap}){ids}"
    )


def _compare_ids(theirs, tokenizer) -> None:
    for sample in SAMPLES:
        found, expected = theirs(sample).input_ids, [tokenizer.eot, *tokenizer.encode(sample)]
        if list(found) != expected:
            raise InteropError(
                f"AutoTokenizer must give the ids of the run's tokenizer {tokenizer.name}; got "
                f"{found[:8]}..., not {expected[:8]}..., of {sample!r}. Set --tokenizer=none to "
                f"export without {FILE}."
            )


@contextlib.contextmanager
def _quiet(transformers):
    """Keeps transformers' progress bars and advice out of our output."""
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

"""Splits jaxtrain's parameters into one tensor per layer, named as a PyTorch model names them.

In the style "jaxtrain" names are those of torch_model.py: `blocks.0.attention.q.weight`, with shape
[outputs, inputs]. In the style "hf" they are Hugging Face's names of the model's family; the parts
of a fused tensor are called `...c_attn.weight/0`, `/1` and `/2`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxtrain.axes import Axes
from jaxtrain.config.train_config import ModelConfig
from jaxtrain.crosscheck.names import find_prefixes
from jaxtrain.crosscheck.trace import Trace, digest, digest_distance
from jaxtrain.interop.families import TensorMapping, family_of_model
from jaxtrain.model.trees import named_leaves

STYLES = ("jaxtrain", "hf")
SAME = 1e-3  # relative distance of two digests below which a matrix counts as the same
ENDINGS = {"w": "weight", "b": "bias"}  # jaxtrain's names -> nn.Linear's; others are the same
# How the names of the tensors after all layers begin, in either style.
AFTER_LAYERS = ("final", "head", "model.norm", "transformer.ln_f", "lm_head")

NameTensors = Callable[[Any], Iterator[tuple[str, np.ndarray]]]


def _own_mappings(axes: dict[str, Axes]) -> Iterator[TensorMapping]:
    """Yields the mappings of the style "jaxtrain", in the order of the network."""
    order = {"embed": 0, "positions": 1, "embed_norm": 2, "blocks": 3}
    for path in sorted(axes, key=lambda path: order.get(path.split(".")[0], 4)):
        *parents, last = path.split(".")
        name = ".".join([*parents, ENDINGS.get(last, last)])
        layered = path.startswith("blocks.")
        if layered:
            name = name.replace("blocks.", "blocks.{}.", 1)
        yield TensorMapping(path, name, transposed=layered and bool(axes[path].outputs))


def build_naming(style: str, cfg: ModelConfig, axes: Any) -> NameTensors:
    """Returns a function that yields (name, array) of a tree, in the order of the network.

    Raises:
        InteropError: the style is "hf" and the model belongs to no known family.
    """
    axes = named_leaves(axes)
    mappings = family_of_model(cfg).tensors(cfg) if style == "hf" else _own_mappings(axes)
    mappings = [mapping for mapping in mappings if mapping.name in axes]
    layered = [m for m in mappings if "{}" in m.hf_name]
    others = [m for m in mappings if "{}" not in m.hf_name]
    front = [m for m in others if not m.hf_name.startswith(AFTER_LAYERS)]
    back = [m for m in others if m.hf_name.startswith(AFTER_LAYERS)]

    def tensor(mapping, leaves, layer=None):
        a, x = axes[mapping.name], np.asarray(leaves[mapping.name])
        if layer is not None:
            x = x[layer].reshape(a.matrix_shape(x.shape)[1:]) if a.outputs else x[layer].ravel()
        x = mapping.swap(x)
        index, parts = mapping.part
        name = mapping.hf_name.format(layer) + (f"/{index}" if parts > 1 else "")
        return name, x.T if mapping.transposed else x

    def name_tensors(tree):
        leaves = named_leaves(tree)
        yield from (tensor(mapping, leaves) for mapping in front)
        yield from (tensor(m, leaves, i) for i in range(cfg.L) for m in layered)
        yield from (tensor(mapping, leaves) for mapping in back)

    return name_tensors


def style_of(trace: Trace | None) -> str:
    """Returns the style of a trace's tensor names: "jaxtrain" if they are ours, else "hf"."""
    is_ours = trace is None or "embed" in trace.steps[-1].get("parameter", {})
    return "jaxtrain" if is_ours else "hf"


def transpose_as(trace: Trace, name_tensors: NameTensors, weights: Any) -> NameTensors:
    """Returns name_tensors with those matrices transposed that `trace` stores transposed.

    nanoGPT has the names of transformers' GPT-2, but its nn.Linear is [outputs, inputs] and the
    Conv1D of transformers [inputs, outputs]. A matrix counts as transposed if the trace's initial
    parameter equals its transpose, and not the matrix.
    """
    start = next((r["parameter"] for r in trace.steps if not r["step"] and "parameter" in r), {})
    ours = dict(name_tensors(weights))
    own_prefix, prefix = find_prefixes(set(ours), set(start))
    seed, turned = trace.header["seed"], set()
    for name, x in ours.items():
        theirs = start.get(prefix + name.removeprefix(own_prefix))
        if theirs is None or x.ndim != 2:
            continue
        is_same = lambda x, theirs=theirs: digest_distance(np.array(digest(x, seed)), theirs) < SAME
        if not is_same(x) and is_same(x.T):
            turned.add(name)
    return lambda tree: ((n, x.T if n in turned else x) for n, x in name_tensors(tree))


def as_stored(style: str, cfg: ModelConfig, params: Any) -> Any:
    """Returns a tree of parameters with the values that a style's model has.

    With "hf" the norms of a Gemma are smaller by 1, as they multiply by 1 + w. Gradients and
    updates are the same in both.
    """
    mappings = family_of_model(cfg).tensors(cfg) if style == "hf" else ()
    offsets = {m.name: m.offset for m in mappings if m.offset}
    if not offsets:
        return params
    shift = lambda name, x: np.asarray(x) - np.asarray(offsets.get(name, 0), x.dtype)
    leaves = [shift(name, x) for name, x in named_leaves(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def relative_to_stored(
    tolerances: dict[str, float], ours: dict[str, np.ndarray], stored: dict[str, np.ndarray]
) -> dict[str, float]:
    """Returns tolerances that are relative to our tensors' norms relative to the stored ones'."""
    norm = lambda x: max(float(np.linalg.norm(x)), 1e-300)
    return {name: x * norm(ours[name]) / norm(stored[name]) for name, x in tolerances.items()}

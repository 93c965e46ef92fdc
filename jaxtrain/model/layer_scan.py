"""Runs the stacked layers under lax.scan, with or without recomputation in the backward pass."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.model.attention import CUDNN_FORWARD
from jaxtrain.model.layer_kinds import LayerKind

policies = jax.checkpoint_policies
_named = policies.save_only_these_names("attention", "attention_lse")


def _is_cudnn(primitive, *_, **__):
    """Returns whether a primitive is cuDNN's attention, whose log-sum-exp has no name to save."""
    return primitive.name == CUDNN_FORWARD


_attention = policies.save_from_both_policies(_named, _is_cudnn)
# model.remat -> which activations of a layer are saved; backward recomputes the others
REMAT = {
    # results of attention and of weight products, so that only element-wise work is repeated
    "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, _attention),
    "attention": _attention,
    "full": policies.nothing_saveable,  # only what enters each layer
}
# jax.checkpoint is not called, and everything is saved. A run resolves "auto" (training/remat.py);
# a model that is built without one has no limit to fit.
SAVE_ALL = ("none", "auto")


def scan_layers(
    kinds: Sequence[LayerKind],
    body: Callable[[LayerKind, jax.Array, Any], tuple[jax.Array, Any]],
    h_BTD: jax.Array,
    layers: Any,
    unroll: int = 1,
    remat: str = "none",
) -> tuple[jax.Array, Any]:
    """Runs body(kind, h_BTD, layer) -> (h_BTD, y) over all layers; returns (h_BTD, stacked y).

    One iteration runs a whole period of kinds, so that no layer branches on its kind. Layers
    beyond the last whole period run after the scan.

    Args:
        kinds: from layer_kinds.
        layers: tree of arrays [L,...].
        unroll: layers per iteration, rounded to whole periods.
        remat: model.remat.
    """

    L, P = len(jax.tree.leaves(layers)[0]), len(kinds)
    is_loop = max(1, unroll // P) < L // P  # otherwise JAX inlines the only iteration

    def body_of(kind, in_loop):
        one_layer = functools.partial(body, kind)
        if remat in SAVE_ALL:
            return one_layer
        # Forward and backward are separate loops, so XLA cannot merge the recomputation with
        # the original: the barriers that prevent_cse adds are not needed there.
        return jax.checkpoint(one_layer, policy=REMAT[remat], prevent_cse=not in_loop)

    if P == 1:
        return jax.lax.scan(body_of(kinds[0], is_loop), h_BTD, layers, unroll=unroll)

    def run(h_BTD, some_layers, in_loop=is_loop):
        results = []
        for i in range(len(jax.tree.leaves(some_layers)[0])):
            layer = jax.tree.map(lambda x, i=i: x[i], some_layers)
            h_BTD, y = body_of(kinds[i], in_loop)(h_BTD, layer)
            results.append(y)
        return h_BTD, jax.tree.map(lambda *ys: jnp.stack(ys), *results)

    whole = L - L % P
    periods = jax.tree.map(lambda x: x[:whole].reshape(-1, P, *x.shape[1:]), layers)
    h_BTD, stacked = jax.lax.scan(run, h_BTD, periods, unroll=max(1, unroll // P))
    stacked = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), stacked)
    if whole < L:
        h_BTD, rest = run(h_BTD, jax.tree.map(lambda x: x[whole:], layers), in_loop=False)
        stacked = jax.tree.map(lambda *ys: jnp.concatenate(ys), stacked, rest)
    return h_BTD, stacked

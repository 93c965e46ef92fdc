"""Turns a ModelConfig into plain functions over a plain dict of arrays.

Only this folder has Flax modules. Layers are stacked on L and run under lax.scan; matrices are cast
to the compute type before the scan, so that gathers under fsdp move half the bytes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config.model_section import ModelConfig
from jaxtrain.distributed.mesh import BATCH_AXES, param_spec
from jaxtrain.model.attention import attend, attend_cached
from jaxtrain.model.dense import wide_dtype
from jaxtrain.model.initialization import build_init
from jaxtrain.model.layer_kinds import layer_kinds
from jaxtrain.model.layer_parts import LayerOps
from jaxtrain.model.layer_scan import scan_layers
from jaxtrain.model.layers import Transformer, look_up_embedding
from jaxtrain.model.logits import cap_logits
from jaxtrain.model.rope import rope_tables
from jaxtrain.model.trees import ArrayTree, AxesTree, param_tree
from jaxtrain.ops.routes import Route


class Model(NamedTuple):
    """A transformer as functions of `params`, a nested dict of arrays with the keys of `axes`."""

    axes: AxesTree
    shapes: ArrayTree  # ShapeDtypeStructs
    init: Callable  # key -> params
    apply: Callable  # (params, tokens_BT, docs_BT=None) -> hidden_BTD
    hidden_states: Callable  # (params, tokens_BT, docs_BT=None) -> ([L+1,B,T,D], hidden_BTD)
    logits: Callable  # (params, hidden_BTD) -> float32 [B,T,V]; for sampling, never in training
    init_cache: Callable  # (B, S) -> empty cache for S keys and values in each layer
    extend: Callable  # (params, cache, tokens_BT, start) -> (hidden_BTD, cache)


def count_params(axes: AxesTree, sizes: dict[str, int]) -> int:
    """Returns the number of parameters, from axes and letter sizes."""
    return sum(math.prod(leaf.shape(sizes)) for leaf in jax.tree.leaves(axes))


class _Network:
    """The forward pass over plain dicts; build_model returns its methods."""

    def __init__(self, cfg, routes, mesh, document_mask):
        self.cfg, self.routes, self.document_mask = cfg, routes, document_mask
        self.mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.dtype = jnp.dtype(cfg.dtype)
        self.wide = wide_dtype(self.dtype)
        self.ops = LayerOps(cfg, routes, self.mesh)
        self.kinds = layer_kinds(cfg)
        abstract = nnx.eval_shape(lambda: Transformer(cfg))
        self.state = nnx.split(abstract, nnx.Param)[1]
        self.axes = param_tree(self.state, lambda _, variable: variable.get_metadata()["axes"])
        self.shapes = param_tree(self.state, lambda _, variable: variable.get_value())
        self.block_def = nnx.split(abstract.blocks, nnx.Param)[0]
        self.norm_def = nnx.split(abstract.final_norm, nnx.Param)[0]

    def constrain(self, x, spec):
        """Constrains the sharding of an array; on one device returns it unchanged."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def gather(self, layer):
        """Gathers one layer's weights over fsdp for use; they stay split over tensor.

        The constraint is inside the scan's body: outside it all layers would be gathered at once.
        """
        mesh = self.mesh
        if mesh is None:
            return layer

        def gather_leaf(leaf_axes, stacked, w):
            spec = param_spec(leaf_axes, stacked.shape, mesh, over=("tensor",))
            return self.constrain(w, P(*spec[1:]))  # without the dim L

        return jax.tree.map(gather_leaf, self.axes["blocks"], self.shapes["blocks"], layer)

    def layer_weights(self, params):
        """Returns all layers' weights with matrices in the compute type; vectors stay wide."""
        cast = lambda axes, w: w.astype(self.dtype) if axes.is_matrix else w
        return jax.tree.map(cast, self.axes["blocks"], params["blocks"])

    def embed(self, params, tokens_BT, start):
        """Returns (h_BTD, RoPE tables of each LayerKind.rope) for tokens from position start on."""
        gather = lambda w_VD: self.constrain(w_VD, P())  # a look-up needs all rows
        h_BTD = look_up_embedding(params["embed"], tokens_BT, self.dtype, gather)
        if self.cfg.embed_scale != 1:  # rounded to the compute type, as Gemma was trained
            h_BTD = h_BTD * jnp.asarray(self.cfg.embed_scale, self.dtype)
        positions_T = start + jnp.arange(tokens_BT.shape[1])
        ropes = {kind.rope: rope_tables(self.cfg, kind.rope, positions_T) for kind in self.kinds}
        if self.cfg.position == "learned":  # summed in float32, so that it is rounded once
            h_BTD = h_BTD.astype(self.wide) + params["positions"][positions_T]
            h_BTD = h_BTD.astype(self.dtype)
        if self.cfg.embed_norm:
            h_BTD = self.normalise(params, "embed_norm", h_BTD)
        return self.constrain(h_BTD, P(BATCH_AXES)), ropes

    def block(self, h_BTD, layer, rope, attend_layer):
        """Runs one layer; returns (h_BTD, attend_layer's extra result)."""
        block = nnx.merge(self.block_def, self.gather(layer))
        h_BTD, extra = block(h_BTD, self.ops, rope, attend_layer)
        return self.constrain(h_BTD, P(BATCH_AXES)), extra

    def normalise(self, params, name, h_BTD):
        """Applies the norm "embed_norm" or "final_norm"; without gains it has no parameters."""
        return nnx.merge(self.norm_def, params.get(name, {}))(h_BTD, self.ops.normalise)

    def scan_layers(self, params, tokens_BT, docs_BT, collect):
        """Returns (first layer's input, last layer's output, collect(h_BTD) of each layer)."""
        first_BTD, ropes = self.embed(params, tokens_BT, 0)
        attention = self.routes["attention"]
        docs_BT = docs_BT if self.document_mask else None

        def body(kind, h_BTD, layer):
            run_attention = functools.partial(attend, attention, docs_BT=docs_BT, mesh=self.mesh)
            attend_layer = lambda *qkv: (run_attention(*qkv, scoring=kind.scoring), None)
            h_BTD, _ = self.block(h_BTD, layer, ropes[kind.rope], attend_layer)
            return h_BTD, collect(h_BTD)

        unroll = int(self.routes["layers"].implementation.removeprefix("unroll="))
        weights, unroll = self.layer_weights(params), min(unroll, self.cfg.L)
        scanned = scan_layers(self.kinds, body, first_BTD, weights, unroll, self.cfg.remat)
        return first_BTD, *scanned

    def apply(self, params, tokens_BT, docs_BT=None):
        _, last_BTD, _ = self.scan_layers(params, tokens_BT, docs_BT, lambda h_BTD: None)
        return self.normalise(params, "final_norm", last_BTD)

    def hidden_states(self, params, tokens_BT, docs_BT=None):
        """Returns (each layer's input and the last layer's output [L+1,B,T,D], hidden_BTD)."""
        first_BTD, last_BTD, each_LBTD = self.scan_layers(
            params, tokens_BT, docs_BT, lambda h_BTD: h_BTD
        )
        return jnp.concatenate([first_BTD[None], each_LBTD]), self.normalise(
            params, "final_norm", last_BTD
        )

    def extend(self, params, cache, tokens_BT, start):
        """Runs tokens from position `start` on; the cache has all earlier keys and values."""
        h_BTD, ropes = self.embed(params, tokens_BT, start)

        def body(kind, h_BTD, layer_and_cache):
            layer, layer_cache = layer_and_cache
            attend_layer = functools.partial(attend_cached, layer_cache, start, kind.scoring)
            return self.block(h_BTD, layer, ropes[kind.rope], attend_layer)

        h_BTD, cache = scan_layers(self.kinds, body, h_BTD, (self.layer_weights(params), cache))
        return self.normalise(params, "final_norm", h_BTD), cache

    def init_cache(self, B, S):
        cfg = self.cfg
        empty = jnp.zeros((cfg.L, B, S, cfg.G, cfg.K), self.dtype)
        return {"k": empty, "v": empty}

    def logits(self, params, h_BTD):
        w_VD = head_weights(params).astype(self.dtype)
        out_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, w_VD, preferred_element_type=self.wide)
        if "head_bias" in params:
            out_BTV = out_BTV + params["head_bias"]
        return cap_logits(out_BTV, self.cfg.logit_softcap, self.cfg.logit_softcap_form)


def head_weights(params: dict[str, Any]) -> jax.Array:
    """Returns the head's master weights [V,D], which are the embedding if the head is tied."""
    return params["head"] if "head" in params else params["embed"]


def build_model(
    cfg: ModelConfig,
    routes: dict[str, Route],
    mesh: Mesh | None = None,
    document_mask: bool = False,
) -> Model:
    """Builds a model with the implementations that `routes` names; creates no arrays.

    Args:
        routes: from jaxtrain.ops.routes.choose_routes.
        mesh: mesh over which params are split; None means one device.
        document_mask: a token attends only to its own document; docs_BT numbers the documents.
    """
    network = _Network(cfg, routes, mesh, document_mask)
    return Model(
        axes=network.axes,
        shapes=network.shapes,
        init=build_init(network.state),
        apply=network.apply,
        hidden_states=network.hidden_states,
        logits=network.logits,
        init_cache=network.init_cache,
        extend=network.extend,
    )

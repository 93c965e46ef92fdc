"""build_model: a ModelConfig to plain functions over a plain dict of arrays.

Flax stops here. Layers are stacked on L and run under lax.scan; matrices are cast to the compute
type before it, so that gathers under fsdp move half the bytes.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.mesh import BATCH_AXES, param_spec
from jaxtrain.model.attention import CUDNN_FORWARD, MASKED, attend
from jaxtrain.model.layers import (
    Transformer,
    build_join,
    build_pair,
    build_turn,
    lookup,
    rope_tables,
)

policies = jax.checkpoint_policies
_named = policies.save_only_these_names("attention", "attention_lse")


def _is_cudnn(primitive, *_, **__):
    """cuDNN's log-sum-exp cannot be named, and without it the backward runs the forward again."""
    return primitive.name == CUDNN_FORWARD


REMAT = {
    "dots": policies.dots_with_no_batch_dims_saveable,
    "attention": policies.save_from_both_policies(_named, _is_cudnn),
    "full": policies.nothing_saveable,
}  # and "none": no checkpoint at all


class Model(NamedTuple):
    """A transformer as functions. `params` is a nested dict of arrays, `axes` its twin of Axes."""

    axes: Any  # tree of Axes
    shapes: Any  # tree of ShapeDtypeStruct
    init: Callable  # key -> params
    apply: Callable  # (params, tokens_BT, docs_BT=None) -> hidden_BTD
    hidden_states: Callable  # as apply -> (what enters and leaves each, [L+1,B,T,D], hidden_BTD)
    logits: Callable  # (params, hidden_BTD) -> float32 [B,T,V]; to sample, never in training
    init_cache: Callable  # (B, S) -> room for S keys and values a layer
    extend: Callable  # (params, cache, tokens_BT, start) -> (hidden_BTD, cache)


def tree_of(state, leaf):
    """leaf(variable) for each Param of an nnx state, as a plain nested dict."""
    tree = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf(path, variable)
    return tree


def count_params(axes, sizes) -> int:
    """Parameters, from axes and letter sizes alone; no array is made."""
    leaves = jax.tree.leaves(axes)
    return sum(math.prod(leaf.shape(sizes)) for leaf in leaves)


def _init(state):
    """key -> params: each leaf normal(mean, std), its stream named by its path alone."""

    def leaf(path, variable):
        meta, value = variable.get_metadata(), variable.get_value()

        def draw(key):
            if not meta["std"]:
                return jnp.full(value.shape, meta["mean"], value.dtype)
            key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
            return meta["std"] * jax.random.normal(key, value.shape, value.dtype)

        return draw

    draws = tree_of(state, leaf)
    return lambda key: jax.tree.map(lambda draw: draw(key), draws)


class _Network:
    """The forward pass over plain dicts; build_model hands out its methods."""

    def __init__(self, cfg, routes, mesh, document_mask):
        self.cfg, self.routes, self.document_mask = cfg, routes, document_mask
        self.mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.dtype = jnp.dtype(cfg.dtype)
        self.wide = jnp.promote_types(self.dtype, jnp.float32)
        dense = routes["dense"].implementation
        join = build_join(routes["norm"], cfg, self.mesh)
        turn = build_turn(routes.get("qk_rope"), cfg, self.mesh)
        pair = build_pair(dense, cfg, self.mesh)
        abstract = nnx.eval_shape(lambda: Transformer(cfg, dense, join, turn, pair))
        self.state = nnx.split(abstract, nnx.Param)[1]
        self.axes = tree_of(self.state, lambda _, variable: variable.get_metadata()["axes"])
        self.shapes = tree_of(self.state, lambda _, variable: variable.get_value())
        self.block_def = nnx.split(abstract.blocks, nnx.Param)[0]
        self.norm_def = nnx.split(abstract.final_norm, nnx.Param)[0]

    def constrain(self, x, spec):
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def gather(self, layer):
        """One layer's weights, gathered over fsdp for use."""
        if self.mesh is None:
            return layer

        def one(leaf_axes, shape, w):
            spec = param_spec(leaf_axes, shape.shape, self.mesh, over=("tensor",))
            return self.constrain(w, P(*spec[1:]))

        return jax.tree.map(one, self.axes["blocks"], self.shapes["blocks"], layer)

    def layer_weights(self, params):
        """All layers' weights, matrices in the compute type; vectors stay wide for the norms."""
        cast = lambda axes, w: w.astype(self.dtype) if axes.is_matrix else w
        return jax.tree.map(cast, self.axes["blocks"], params["blocks"])

    def embed(self, params, tokens_BT, start):
        """(h_BTD, rope tables or None) of tokens that stand at start, start + 1, ..."""
        whole = lambda w_VD: self.constrain(w_VD, P())  # lookups need the table whole
        h_BTD = lookup(params["embed"], tokens_BT, self.dtype, whole)
        at_T = start + jnp.arange(tokens_BT.shape[1])
        if self.cfg.position == "learned":
            h_BTD = h_BTD.astype(self.wide) + params["positions"][at_T]  # one rounding, not two
            return self.constrain(h_BTD.astype(self.dtype), P(BATCH_AXES)), None
        return self.constrain(h_BTD, P(BATCH_AXES)), rope_tables(self.cfg, at_T)

    def block(self, h_BTD, layer, rope, mix):
        h_BTD, extra = nnx.merge(self.block_def, self.gather(layer))(h_BTD, rope, mix)
        return self.constrain(h_BTD, P(BATCH_AXES)), extra

    def final_norm(self, params, h_BTD):
        return nnx.merge(self.norm_def, params["final_norm"])(h_BTD)

    def run(self, params, tokens_BT, docs_BT, keep):
        """(what enters the first layer, what leaves the last, keep(what leaves each))."""
        first_BTD, rope = self.embed(params, tokens_BT, 0)
        attention = self.routes["attention"]
        docs_BT = docs_BT if self.document_mask else None

        def body(h_BTD, layer):
            mix = lambda q, k, v: (attend(attention, q, k, v, docs_BT, self.mesh), None)
            h_BTD, _ = self.block(h_BTD, layer, rope, mix)
            return h_BTD, keep(h_BTD)

        if self.cfg.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.cfg.remat], prevent_cse=False)
        unroll = int(self.routes["layers"].implementation.removeprefix("unroll="))
        weights, unroll = self.layer_weights(params), min(unroll, self.cfg.L)
        return first_BTD, *jax.lax.scan(body, first_BTD, weights, unroll=unroll)

    def apply(self, params, tokens_BT, docs_BT=None):
        _, last_BTD, _ = self.run(params, tokens_BT, docs_BT, lambda h_BTD: None)
        return self.final_norm(params, last_BTD)

    def hidden_states(self, params, tokens_BT, docs_BT=None):
        first_BTD, last_BTD, each_LBTD = self.run(params, tokens_BT, docs_BT, lambda h_BTD: h_BTD)
        return jnp.concatenate([first_BTD[None], each_LBTD]), self.final_norm(params, last_BTD)

    def extend(self, params, cache, tokens_BT, start):
        h_BTD, rope = self.embed(params, tokens_BT, start)

        def body(h_BTD, xs):
            layer, seen = xs
            return self.block(h_BTD, layer, rope, functools.partial(_attend_cached, seen, start))

        h_BTD, cache = jax.lax.scan(body, h_BTD, (self.layer_weights(params), cache))
        return self.final_norm(params, h_BTD), cache

    def init_cache(self, B, S):
        cfg = self.cfg
        empty = jnp.zeros((cfg.L, B, S, cfg.G, cfg.K), self.dtype)
        return {"k": empty, "v": empty}

    def logits(self, params, h_BTD):
        w_VD = head_weights(params).astype(self.dtype)
        out_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, w_VD, preferred_element_type=self.wide)
        cap = self.cfg.logit_softcap
        return cap * jnp.tanh(out_BTV / cap) if cap else out_BTV


def head_weights(params):
    """The head's master weights [V,D]: its own, or the embedding that it shares."""
    return params["head"] if "head" in params else params["embed"]


def build_model(cfg, routes, mesh=None, document_mask=False) -> Model:
    """The model of a ModelConfig with the implementations that `routes` names.

    Args:
        routes: from jaxtrain.ops.routes.choose_routes.
        mesh: where params lie; None or one device leaves placement to JAX.
        document_mask: attention stays inside the documents that apply is given.
    """
    net = _Network(cfg, routes, mesh, document_mask)
    return Model(
        axes=net.axes,
        shapes=net.shapes,
        init=_init(net.state),
        apply=net.apply,
        hidden_states=net.hidden_states,
        logits=net.logits,
        init_cache=net.init_cache,
        extend=net.extend,
    )


def _attend_cached(cache, start, q_BTHK, k_BTGK, v_BTGK):
    """Attention of tokens start..start+T over the cache [B,S,G,K] that they are first put into."""
    B, T, H, K = q_BTHK.shape
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    k_BSGK, v_BSGK = put(cache["k"], k_BTGK), put(cache["v"], v_BTGK)
    S, G = k_BSGK.shape[1:3]
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    s = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide)
    seen_TS = (start + jnp.arange(T))[:, None] >= jnp.arange(S)[None, :]
    p = jax.nn.softmax(jnp.where(seen_TS, s * K**-0.5, MASKED), axis=-1).astype(v_BSGK.dtype)
    o = jnp.einsum("BGRTS,BSGK->BTGRK", p, v_BSGK, preferred_element_type=wide)
    return o.reshape(B, T, H, K).astype(q_BTHK.dtype), {"k": k_BSGK, "v": v_BSGK}

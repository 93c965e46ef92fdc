"""Flax modules of the transformer: embedding look-up, attention, MLP, block and all parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxtrain.config.model_section import ModelConfig
from jaxtrain.model.initialization import initial_std
from jaxtrain.model.layer_parts import LayerOps, Linear, Norm, param
from jaxtrain.model.rope import RopeTables

Attend = Callable[..., tuple[jax.Array, Any]]  # (q_BTHK, k_BTGK, v_BTGK) -> (o_BTHK, extra)


def _look_up_embedding(
    w_VD: jax.Array,
    tokens_BT: jax.Array,
    dtype: DTypeLike,
    place: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns each token's row of a table, [B,T,D] in dtype.

    The table's gradient is summed in the table's type. JAX's own would add up a frequent token's
    gradients in bfloat16 and lose most of them.

    Args:
        place: constrains the sharding of the table [V,D] after its cast to dtype.
    """
    return place(w_VD.astype(dtype))[tokens_BT]


def _look_up_forward(w_VD, tokens_BT, dtype, place):
    zeros_VD = jnp.zeros_like(w_VD)  # the backward adds to them; XLA creates them only there
    return look_up_embedding(w_VD, tokens_BT, dtype, place), (zeros_VD, tokens_BT)


def _look_up_backward(dtype, place, residuals, g_BTD):
    zeros_VD, tokens_BT = residuals
    return zeros_VD.at[tokens_BT].add(g_BTD.astype(zeros_VD.dtype)), None


look_up_embedding = jax.custom_vjp(_look_up_embedding, nondiff_argnums=(2, 3))
look_up_embedding.defvjp(_look_up_forward, _look_up_backward)


class Attention(nnx.Module):
    """Multi-head attention with its four projections."""

    def __init__(self, cfg: ModelConfig):
        bias = cfg.attention_bias != "none"
        self.q = Linear(cfg, "L|D->HK", initial_std(cfg, "q"), bias)
        self.k = Linear(cfg, "L|D->GK", initial_std(cfg, "k"), bias)
        self.v = Linear(cfg, "L|D->GK", initial_std(cfg, "v"), bias)
        self.o = Linear(cfg, "L|HK->D", initial_std(cfg, "o"), cfg.attention_bias == "all")
        # so that a constant added to all scores of a query does not cancel
        self.changes_scores = cfg.qk_norm or cfg.attention_softcap > 0
        # Source: https://arxiv.org/abs/2010.04245; over all heads: OLMo 2, arxiv.org/abs/2501.00656
        over_all = cfg.qk_norm_over == "all"
        build_norm = lambda axes: Norm(cfg, axes, "rms", cfg.qk_norm_gain) if cfg.qk_norm else None
        self.q_norm = build_norm("L|HK" if over_all else "L|K")
        self.k_norm = build_norm("L|GK" if over_all else "L|K")

    def __call__(
        self,
        x_BTD: jax.Array,
        ops: LayerOps,
        rope: RopeTables | None,
        attend: Attend,
        add_bias: bool = True,
    ) -> tuple[jax.Array, Any]:
        """Returns ([B,T,D], attend's extra result).

        Args:
            add_bias: whether the output contains output_bias.
        """
        cancels = ops.moves_attention_biases and rope is None and not self.changes_scores
        q, k = self.q(x_BTD, ops), self.k(x_BTD, ops, add_bias=not cancels)
        v = self.v(x_BTD, ops, add_bias=not self._moves_value_bias(ops))
        q = ops.norm_and_rotate(self.q_norm, q, rope)
        k = ops.norm_and_rotate(self.k_norm, k, rope)
        o_BTHK, extra = attend(q, k, v)
        bias_D = self.output_bias(ops) if add_bias else None
        return self.o.map_and_add(o_BTHK, ops, bias_D), extra

    def _moves_value_bias(self, ops: LayerOps) -> bool:
        return ops.moves_attention_biases and self.v.has_bias and self.o.has_bias

    def output_bias(self, ops: LayerOps) -> jax.Array | None:
        """Returns the bias of the output projection, [D], if it has one.

        On a GPU it contains what the values' bias adds to each output: probabilities sum to one.
        The keys' bias adds q.b to all scores of a query, which the softmax cancels. So neither
        needs a pass over [B,T,G,K].
        """
        if not self._moves_value_bias(ops):
            return self.o.own_bias()
        b_GK, w_HKD = self.v.b[...], self.o.w[...]
        b_HK = jnp.repeat(b_GK, len(w_HKD) // len(b_GK), 0)
        moved_D = jnp.einsum("HK,HKD->D", b_HK, w_HKD.astype(b_HK.dtype), precision="highest")
        return self.o.b[...] + moved_D


class Mlp(nnx.Module):
    """Feed-forward layer: SwiGLU, GeGLU, GELU or squared ReLU."""

    def __init__(self, cfg: ModelConfig):
        self.form, self.is_gated = cfg.mlp, cfg.has_gated_mlp
        if self.is_gated:
            self.gate = Linear(cfg, "L|D->F", initial_std(cfg, "gate"))
        self.up = Linear(cfg, "L|D->F", initial_std(cfg, "up"))
        self.down = Linear(cfg, "L|F->D", initial_std(cfg, "down"))

    def __call__(self, x_BTD: jax.Array, ops: LayerOps) -> jax.Array:
        if self.is_gated:  # https://arxiv.org/abs/2002.05202
            gate, up = ops.gate_and_up(self.gate, self.up, x_BTD)
            return self.down((jax.nn.silu if self.form == "swiglu" else ops.gelu)(gate) * up, ops)
        if self.form == "gelu":
            if ops.gelu_of_sum is not None:
                bias_F = self.up.b[...] if self.up.has_bias else None
                product = self.up(x_BTD, ops, add_bias=False)
                return self.down(ops.gelu_of_sum(product, bias_F), ops)
            return self.down(ops.gelu(self.up(x_BTD, ops)), ops)
        up = self.up(x_BTD, ops)
        return self.down(jnp.square(jax.nn.relu(up)), ops)  # https://arxiv.org/abs/2109.08668


class Block(nnx.Module):
    """One layer: h + attention(h), then h + mlp(h), with norms where model.norm_place puts them.

    Before: attention(norm(h)), as in GPT-2. After: norm(attention(h)), as in OLMo 2,
    https://arxiv.org/abs/2501.00656. Both: as in Gemma 2, https://arxiv.org/abs/2408.00118.
    """

    def __init__(self, cfg: ModelConfig):
        build = lambda place: Norm(cfg, "L|D", cfg.norm) if cfg.norm_place in place else None
        before, after = ("pre", "both"), ("post", "both")
        self.attention_norm, self.attention_post_norm = build(before), build(after)
        self.attention = Attention(cfg)
        self.mlp_norm, self.mlp_post_norm = build(before), build(after)
        self.mlp = Mlp(cfg)

    def __call__(
        self, h_BTD: jax.Array, ops: LayerOps, rope: RopeTables | None, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Returns ([B,T,D], attend's extra result)."""
        h_BTD, n_BTD = ops.add_norm(self.attention_norm, h_BTD)
        # The kernel of the next norm adds the output's bias, and its backward sums the gradient.
        post_norm = self.attention_post_norm
        norm_adds = ops.fused_add_norm is not None and post_norm is None
        bias_D = self.attention.output_bias(ops) if norm_adds else None
        y_BTD, extra = self.attention(n_BTD, ops, rope, attend, add_bias=not norm_adds)
        if post_norm is not None:
            y_BTD = post_norm(y_BTD, ops.normalise)
        h_BTD, n_BTD = ops.add_norm(self.mlp_norm, h_BTD, y_BTD, bias_D)
        y_BTD = self.mlp(n_BTD, ops)
        if self.mlp_post_norm is not None:
            y_BTD = self.mlp_post_norm(y_BTD, ops.normalise)
        return h_BTD + y_BTD, extra


class Transformer(nnx.Module):
    """All parameters; transformer.py computes the forward pass."""

    def __init__(self, cfg: ModelConfig):
        self.embed = param(cfg, "V|D", initial_std(cfg, "embed"))
        if cfg.position == "learned":
            self.positions = param(cfg, "T|D", initial_std(cfg, "positions"))
        self.embed_norm = Norm(cfg, "|D", cfg.norm) if cfg.embed_norm else None
        self.blocks = Block(cfg)
        self.final_norm = Norm(cfg, "|D", cfg.norm)
        if not cfg.tied:
            self.head = param(cfg, "|V<-D", initial_std(cfg, "head"))
        if cfg.head_bias:
            self.head_bias = param(cfg, "|V")

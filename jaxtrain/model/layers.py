"""Flax modules of the transformer, which declare the parameters of all layers and run one layer.

Each parameter is declared by its axes string and its initial standard deviation; shapes,
initialisation, sharding, optimizer routing and export follow from those two. Ops with several
implementations are methods of LayerOps, which is passed to each call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxtrain.axes import Axes
from jaxtrain.config.model_section import ModelConfig
from jaxtrain.model.dense import DENSE, wide_dtype
from jaxtrain.model.initialization import embedding_std, head_std, residual_std, small_std
from jaxtrain.model.rope import RopeTables, rotate
from jaxtrain.ops import fused
from jaxtrain.ops.routes import Route

Attend = Callable[..., tuple[jax.Array, Any]]  # (q_BTHK, k_BTGK, v_BTGK) -> (o_BTHK, extra)


def letter_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Returns the size of each axis letter; T is the number of learned positions."""
    return {letter: getattr(cfg, letter) for letter in "DFGHKLV"} | {"T": cfg.positions}


def param(cfg: ModelConfig, axes: str, std: float = 0.0, mean: float = 0.0) -> nnx.Param:
    """Declares a parameter. The zeros are abstract: modules are built under nnx.eval_shape."""
    parsed = Axes.parse(axes)
    dtype = jnp.float64 if cfg.dtype == "float64" else jnp.float32
    zeros = jnp.zeros(parsed.shape(letter_sizes(cfg)), dtype)
    return nnx.Param(zeros, axes=parsed, std=std, mean=mean)


class Norm(nnx.Module):
    """RMS or layer norm. Computes in at least float32: bf16 would lose the mean square."""

    def __init__(self, cfg: ModelConfig, axes: str):
        self.cfg = cfg
        self.gain = param(cfg, axes, mean=1.0)
        self.has_bias = cfg.norm == "layer" and cfg.bias
        if self.has_bias:
            self.bias = param(cfg, axes)

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        x = x_XD.astype(wide_dtype(x_XD.dtype))
        if self.cfg.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.cfg.norm_eps)
        x = x * self.gain[...]
        if self.has_bias:
            x = x + self.bias[...]
        return x.astype(x_XD.dtype)


class HeadNorm(nnx.Module):
    """RMS norm of each head's query or key. Source: https://arxiv.org/abs/2010.04245."""

    def __init__(self, cfg: ModelConfig):
        self.eps = cfg.norm_eps
        self.gain = param(cfg, "L|K", mean=1.0)

    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        x = x_BTHK.astype(wide_dtype(x_BTHK.dtype))
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return (x * self.gain[...]).astype(x_BTHK.dtype)


class LayerOps:
    """A layer's ops, each with the implementation that its route names.

    Args:
        routes: from choose_routes.
        mesh: splits rows over (replica, fsdp) and heads over tensor; None means one device.
    """

    def __init__(self, cfg: ModelConfig, routes: dict[str, Route], mesh: Mesh | None = None):
        norm, qk_rope, dense = routes["norm"], routes.get("qk_rope"), routes["dense"]
        self.dense = DENSE[dense.implementation]
        self.fused_add_norm = self.fused_qk_rope = None
        if norm.is_fused:
            self.fused_add_norm = fused.build_add_norm(norm, cfg.norm, cfg.norm_eps, mesh)
        if qk_rope is not None and qk_rope.is_fused:
            self.fused_qk_rope = fused.build_qk_rope(qk_rope, cfg.norm_eps, mesh)
        # On one GPU a joint product reads x once and sums x's gradient inside the dot: 5.5 % fewer
        # bytes a step at 1.4B. On 8 GPUs with fsdp the collectives would take 15 % longer
        # (jaxtrain.plan, jax 0.10.2).
        self.joins_gate_and_up = dense.implementation == "plain" and not cfg.bias and mesh is None

    def add_norm(
        self, norm: Norm, h_BTD: jax.Array, y_BTD: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Computes (h + y, its norm); without y, (h, its norm)."""
        if self.fused_add_norm is not None:
            bias_D = norm.bias[...] if norm.has_bias else None
            return self.fused_add_norm(h_BTD, y_BTD, norm.gain[...], bias_D)
        h_BTD = h_BTD if y_BTD is None else h_BTD + y_BTD
        return h_BTD, norm(h_BTD)

    def norm_and_rotate(
        self, norm: HeadNorm | None, x_BTHK: jax.Array, rope: RopeTables | None
    ) -> jax.Array:
        """Normalises and rotates queries or keys, if the model has qk_norm and RoPE."""
        if self.fused_qk_rope is not None:
            assert norm is not None and rope is not None, "the kernel does both"
            return self.fused_qk_rope(x_BTHK, norm.gain[...], *rope)
        x_BTHK = x_BTHK if norm is None else norm(x_BTHK)
        return x_BTHK if rope is None else rotate(x_BTHK, *rope)

    def gate_and_up(
        self, gate: "Linear", up: "Linear", x_BTD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the two products of SwiGLU, each [B,T,F], with or without joining them."""
        if not self.joins_gate_and_up:
            return gate(x_BTD, self), up(x_BTD, self)
        w_DNF = jnp.stack([gate.w[...], up.w[...]], 1)
        y_BTNF = jnp.einsum("BTD,DNF->BTNF", x_BTD, w_DNF)
        return y_BTNF[:, :, 0], y_BTNF[:, :, 1]


class Linear(nnx.Module):
    """A map [B,T,inputs] -> [B,T,outputs] with a matrix `w` and, with model.bias, a bias `b`."""

    def __init__(self, cfg: ModelConfig, axes: str, std: float):
        parsed = Axes.parse(axes)
        self.w = param(cfg, axes, std)
        if cfg.bias:
            self.b = param(cfg, f"{parsed.stack}|{parsed.outputs}")
        self.has_bias = cfg.bias
        self.input_dims = len(parsed.inputs)

    def __call__(self, x: jax.Array, ops: LayerOps) -> jax.Array:
        w = self.w[...]
        inputs, outputs = w.shape[: self.input_dims], w.shape[self.input_dims :]
        assert inputs == x.shape[2:], f"{x.shape} does not end in {inputs}"
        x_BTI = x.reshape(*x.shape[:2], -1)
        w_IO = w.reshape(x_BTI.shape[-1], -1)
        b_O = self.b[...].reshape(-1) if self.has_bias else None
        return ops.dense(x_BTI, w_IO, b_O).reshape(*x.shape[:2], *outputs)


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
        self.q = Linear(cfg, "L|D->HK", small_std(cfg))
        self.k = Linear(cfg, "L|D->GK", small_std(cfg))
        self.v = Linear(cfg, "L|D->GK", small_std(cfg))
        self.o = Linear(cfg, "L|HK->D", residual_std(cfg))
        self.q_norm = HeadNorm(cfg) if cfg.qk_norm else None
        self.k_norm = HeadNorm(cfg) if cfg.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, ops: LayerOps, rope: RopeTables | None, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Returns ([B,T,D], attend's extra result)."""
        q, k, v = self.q(x_BTD, ops), self.k(x_BTD, ops), self.v(x_BTD, ops)
        q = ops.norm_and_rotate(self.q_norm, q, rope)
        k = ops.norm_and_rotate(self.k_norm, k, rope)
        o_BTHK, extra = attend(q, k, v)
        return self.o(o_BTHK, ops), extra


class Mlp(nnx.Module):
    """Feed-forward layer: SwiGLU, GELU or squared ReLU."""

    def __init__(self, cfg: ModelConfig):
        self.form = cfg.mlp
        if cfg.mlp == "swiglu":
            self.gate = Linear(cfg, "L|D->F", small_std(cfg))
        self.up = Linear(cfg, "L|D->F", small_std(cfg))
        self.down = Linear(cfg, "L|F->D", residual_std(cfg))

    def __call__(self, x_BTD: jax.Array, ops: LayerOps) -> jax.Array:
        if self.form == "swiglu":  # https://arxiv.org/abs/2002.05202
            gate, up = ops.gate_and_up(self.gate, self.up, x_BTD)
            return self.down(jax.nn.silu(gate) * up, ops)
        up = self.up(x_BTD, ops)
        if self.form == "gelu":  # the tanh approximation, as in GPT-2
            return self.down(jax.nn.gelu(up, approximate=True), ops)
        return self.down(jnp.square(jax.nn.relu(up)), ops)  # https://arxiv.org/abs/2109.08668


class Block(nnx.Module):
    """One layer, pre-norm: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, cfg: ModelConfig):
        self.attention_norm = Norm(cfg, "L|D")
        self.attention = Attention(cfg)
        self.mlp_norm = Norm(cfg, "L|D")
        self.mlp = Mlp(cfg)

    def __call__(
        self, h_BTD: jax.Array, ops: LayerOps, rope: RopeTables | None, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Returns ([B,T,D], attend's extra result)."""
        h_BTD, n_BTD = ops.add_norm(self.attention_norm, h_BTD)
        y_BTD, extra = self.attention(n_BTD, ops, rope, attend)
        h_BTD, n_BTD = ops.add_norm(self.mlp_norm, h_BTD, y_BTD)
        return h_BTD + self.mlp(n_BTD, ops), extra


class Transformer(nnx.Module):
    """All parameters; transformer.py computes the forward pass."""

    def __init__(self, cfg: ModelConfig):
        self.embed = param(cfg, "V|D", embedding_std(cfg))
        if cfg.position == "learned":
            self.positions = param(cfg, "T|D", embedding_std(cfg))
        self.blocks = Block(cfg)
        self.final_norm = Norm(cfg, "|D")
        if not cfg.tied:
            self.head = param(cfg, "|V<-D", head_std(cfg))

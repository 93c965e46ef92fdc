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
from jaxtrain.model import activations
from jaxtrain.model.dense import DENSE
from jaxtrain.model.initialization import initial_std
from jaxtrain.model.rope import RopeTables, rotate
from jaxtrain.ops import fused
from jaxtrain.ops.routes import Route
from pallas_kernels.gelu_xla import gelu_xla

Attend = Callable[..., tuple[jax.Array, Any]]  # (q_BTHK, k_BTGK, v_BTGK) -> (o_BTHK, extra)


def letter_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Returns the size of each axis letter; T is the number of learned positions."""
    return {letter: getattr(cfg, letter) for letter in "DFGHKLV"} | {"T": cfg.positions}


def param(cfg: ModelConfig, axes: str | Axes, std: float = 0.0, mean: float = 0.0) -> nnx.Param:
    """Declares a parameter. The zeros are abstract: modules are built under nnx.eval_shape."""
    parsed = Axes.parse(axes)
    dtype = jnp.float64 if cfg.dtype == "float64" else jnp.float32
    zeros = jnp.zeros(parsed.shape(letter_sizes(cfg)), dtype)
    return nnx.Param(zeros, axes=parsed, std=std, mean=mean)


class Norm(nnx.Module):
    """RMS or layer norm. Computes in at least float32: bf16 would lose the mean square.

    Args:
        axes: of the gain; the letters after the bar are the dims that are normalised together.
        form: "rms" or "layer".
        gain: whether it multiplies by gains if model.norm_gain is true.
    """

    def __init__(self, cfg: ModelConfig, axes: str, form: str, gain: bool = True):
        self.form, self.eps = form, cfg.norm_eps
        self.dims = tuple(range(-len(Axes.parse(axes).inputs), 0))
        self.gain = param(cfg, axes, mean=1.0) if cfg.norm_gain and gain else None
        self.bias = param(cfg, axes) if form == "layer" and cfg.bias else None

    def __call__(self, x_XD: jax.Array, normalise: Callable = activations.normalise) -> jax.Array:
        gain = self.gain[...] if self.gain is not None else None
        bias = self.bias[...] if self.bias is not None else None
        return normalise(x_XD, gain, bias, self.form, self.dims, self.eps)


class LayerOps:
    """A layer's ops, each with the implementation that its route names.

    Args:
        routes: from choose_routes.
        mesh: splits rows over (replica, fsdp) and heads over tensor; None means one device.
    """

    def __init__(self, cfg: ModelConfig, routes: dict[str, Route], mesh: Mesh | None = None):
        norm, qk_rope, dense = routes["norm"], routes.get("qk_rope"), routes["dense"]
        gelu = routes.get("gelu")
        self.dense = DENSE[dense.implementation]
        self.fused_add_norm = self.fused_qk_rope = self.fused_gelu = None
        if norm.is_fused:
            self.fused_add_norm = fused.build_add_norm(norm, cfg.norm, cfg.norm_eps, mesh)
        if qk_rope is not None and qk_rope.is_fused:
            self.fused_qk_rope = fused.build_qk_rope(qk_rope, cfg.norm_eps, mesh)
        if gelu is not None and gelu.is_fused:
            self.fused_gelu = fused.build_gelu(gelu, mesh)
        # On one GPU a joint product reads x once and sums x's gradient inside the dot: 5.5 % fewer
        # bytes a step at 1.4B. On 8 GPUs with fsdp the collectives would take 15 % longer
        # (jaxtrain.plan, jax 0.10.2).
        is_gpu = dense.implementation == "plain"
        self.joins_gate_and_up = is_gpu and not cfg.bias and mesh is None
        self.normalise = activations.normalise_gpu if is_gpu else activations.normalise
        self.gelu_of_sum = self.fused_gelu or (gelu_xla if is_gpu else None)
        self.gelu = gelu_xla if is_gpu else activations.gelu
        self.moves_attention_biases = is_gpu

    def add_norm(
        self,
        norm: Norm | None,
        h_BTD: jax.Array,
        y_BTD: jax.Array | None = None,
        y_bias_D: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes (h + y, its norm); without y, (h, its norm); without a norm, the sum twice.

        Args:
            y_bias_D: a bias that y lacks; only the kernel adds it.
        """
        if self.fused_add_norm is not None:
            assert norm is not None and norm.gain is not None, "the kernel normalises with gains"
            bias_D = norm.bias[...] if norm.bias is not None else None
            return self.fused_add_norm(h_BTD, y_BTD, norm.gain[...], bias_D, y_bias_D)
        assert y_bias_D is None, "the norm adds a bias only if it is a kernel"
        h_BTD = h_BTD if y_BTD is None else h_BTD + y_BTD
        return h_BTD, h_BTD if norm is None else norm(h_BTD, self.normalise)

    def norm_and_rotate(
        self, norm: Norm | None, x_BTHK: jax.Array, rope: RopeTables | None
    ) -> jax.Array:
        """Normalises and rotates queries or keys, if the model has qk_norm and RoPE."""
        if self.fused_qk_rope is not None and rope is not None:
            assert norm is not None and norm.gain is not None, "the kernel needs gains"
            return self.fused_qk_rope(x_BTHK, norm.gain[...], *rope)
        x_BTHK = x_BTHK if norm is None else norm(x_BTHK, self.normalise)
        return x_BTHK if rope is None else rotate(x_BTHK, *rope)

    def gate_and_up(
        self, gate: "Linear", up: "Linear", x_BTD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the two products of a gated MLP, each [B,T,F], with or without joining them."""
        if not self.joins_gate_and_up:
            return gate(x_BTD, self), up(x_BTD, self)
        w_DNF = jnp.stack([gate.w[...], up.w[...]], 1)
        y_BTNF = jnp.einsum("BTD,DNF->BTNF", x_BTD, w_DNF)
        return y_BTNF[:, :, 0], y_BTNF[:, :, 1]


class Linear(nnx.Module):
    """A map [B,T,inputs] -> [B,T,outputs] with a matrix `w`.

    With model.bias, or `bias`, it has a bias `b`.
    """

    def __init__(self, cfg: ModelConfig, axes: str, std: float, bias: bool = False):
        parsed = Axes.parse(axes)
        self.w = param(cfg, axes, std)
        self.has_bias = cfg.bias or bias
        if self.has_bias:
            self.b = param(cfg, Axes(parsed.stack, parsed.outputs))
        self.input_dims = len(parsed.inputs)

    def own_bias(self) -> jax.Array | None:
        """Returns the bias, of all outputs' dims, or None."""
        return self.b[...] if self.has_bias else None

    def __call__(self, x: jax.Array, ops: LayerOps, add_bias: bool = True) -> jax.Array:
        return self.map_and_add(x, ops, self.own_bias() if add_bias else None)

    def map_and_add(self, x: jax.Array, ops: LayerOps, bias: jax.Array | None) -> jax.Array:
        """Maps x and adds a bias of all outputs' dims, or None."""
        w = self.w[...]
        inputs, outputs = w.shape[: self.input_dims], w.shape[self.input_dims :]
        assert inputs == x.shape[2:], f"{x.shape} does not end in {inputs}"
        x_BTI = x.reshape(*x.shape[:2], -1)
        w_IO = w.reshape(x_BTI.shape[-1], -1)
        b_O = None if bias is None else bias.reshape(-1)
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

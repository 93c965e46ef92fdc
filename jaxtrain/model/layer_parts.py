"""The parts that all layers are made of: parameters, norms, matrices, and the ops that run them.

Each parameter is declared by its axes string and its initial standard deviation; shapes,
initialisation, sharding, optimizer routing and export follow from those two. Ops with several
implementations are methods of LayerOps, which is passed to each call.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtrain.axes import Axes
from jaxtrain.config.model_section import ModelConfig
from jaxtrain.model.dense import DENSE
from jaxtrain.model.rope import RopeTables, rotate
from jaxtrain.ops import fused
from jaxtrain.ops.routes import Route
from pallas_kernels.gelu_xla import gelu_xla
from pallas_kernels.norm_xla import normalise, normalise_gpu


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

    def __call__(self, x_XD: jax.Array, normalise: Callable = normalise) -> jax.Array:
        gain = self.gain[...] if self.gain is not None else None
        bias = self.bias[...] if self.bias is not None else None
        return normalise(x_XD, gain, bias, self.form, self.dims, self.eps)


def gelu(x: jax.Array) -> jax.Array:
    """Computes GELU with tanh, as GPT-2 and Gemma do."""
    return jax.nn.gelu(x, approximate=True)


class LayerOps:
    """A layer's ops, each with the implementation that its route names.

    Args:
        routes: from choose_routes.
        mesh: splits rows over (replica, fsdp) and heads over tensor; None means one device.
    """

    def __init__(self, cfg: ModelConfig, routes: dict[str, Route], mesh: Mesh | None = None):
        norm, qk_rope, dense = routes["norm"], routes.get("qk_rope"), routes["dense"]
        gelu_route = routes.get("gelu")
        self.dense = DENSE[dense.implementation]
        self.fused_add_norm = self.fused_qk_rope = self.fused_gelu = None
        if norm.is_fused:
            self.fused_add_norm = fused.build_add_norm(norm, cfg.norm, cfg.norm_eps, mesh)
        if qk_rope is not None and qk_rope.is_fused:
            self.fused_qk_rope = fused.build_qk_rope(qk_rope, cfg.norm_eps, mesh)
        if gelu_route is not None and gelu_route.is_fused:
            self.fused_gelu = fused.build_gelu(gelu_route, mesh)
        # On one GPU a joint product reads x once and sums x's gradient inside the dot: 5.5 % fewer
        # bytes a step at 1.4B. On 8 GPUs with fsdp the collectives would take 15 % longer
        # (jaxtrain.plan, jax 0.10.2).
        is_gpu = dense.implementation == "plain"
        self.joins_gate_and_up = is_gpu and not cfg.bias and mesh is None
        self.normalise = normalise_gpu if is_gpu else normalise
        self.gelu_of_sum = self.fused_gelu or (gelu_xla if is_gpu else None)
        self.gelu = gelu_xla if is_gpu else gelu
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

"""Flax modules of one transformer: parameter containers whose calls see one layer's slice.

Each parameter is declared by its axes string and the standard deviation it starts from; shapes,
initialisation, sharding, optimizer routing and export follow from those two.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.axes import Axes
from jaxtrain.model.dense import DENSE
from jaxtrain.ops import fused


def letter_sizes(cfg) -> dict[str, int]:
    """Letter -> size, from a ModelConfig; T is the learned positions."""
    return {letter: getattr(cfg, letter) for letter in "DFGHKLV"} | {"T": cfg.positions}


def small_std(cfg) -> float:
    """For embeddings and for matrices that read the residual stream.

    Source: Nguyen & Salazar 2019, https://arxiv.org/abs/1910.05895 ("SmallInit").
    """
    return (2 / (5 * cfg.D)) ** 0.5


def residual_std(cfg) -> float:
    """For matrices that write to the residual stream, so that L layers together stay of order 1.

    Source: Wang & Komatsuzaki 2021, as in GPT-NeoX-20B, https://arxiv.org/abs/2204.06745.
    """
    return 2 / (cfg.L * cfg.D**0.5)


def param(cfg, axes: str, std: float = 0.0, mean: float = 0.0) -> nnx.Param:
    """Declares a parameter; built under nnx.eval_shape, so no array is made here."""
    parsed = Axes.parse(axes)
    dtype = jnp.float64 if cfg.dtype == "float64" else jnp.float32
    return nnx.Param(
        jnp.zeros(parsed.shape(letter_sizes(cfg)), dtype), axes=parsed, std=std, mean=mean
    )


def build_join(route, cfg, mesh=None):
    """join(norm, h_BTD, y_BTD=None) -> (h + y, norm of it), by the route of a ModelConfig's norm.

    Args:
        mesh: rows lie over (replica, fsdp).
    """
    if not route.implementation.startswith("fused"):

        def plain(norm, h_BTD, y_BTD=None):
            h_BTD = h_BTD if y_BTD is None else h_BTD + y_BTD
            return h_BTD, norm(h_BTD)

        return plain

    kernel = fused.build_add_norm(route, cfg.norm, cfg.norm_eps, mesh)

    def joined(norm, h_BTD, y_BTD=None):
        bias_D = norm.bias[...] if cfg.norm == "layer" and cfg.bias else None
        return kernel(h_BTD, y_BTD, norm.gain[...], bias_D)

    return joined


def build_turn(route, cfg, mesh=None):
    """turn(norm, x_BTHK, rope) -> queries or keys normed and rotated; norm and rope may be None.

    Args:
        route: of a ModelConfig's qk_rope; None where it has no such op.
        mesh: rows lie over (replica, fsdp), heads over tensor.
    """
    if route is None or not route.implementation.startswith("fused"):

        def plain(norm, x_BTHK, rope):
            x_BTHK = x_BTHK if norm is None else norm(x_BTHK)
            return x_BTHK if rope is None else rotate(x_BTHK, *rope)

        return plain

    kernel = fused.build_qk_rope(route, cfg.norm_eps, mesh)
    return lambda norm, x_BTHK, rope: kernel(x_BTHK, norm.gain[...], *rope)


def build_pair(dense, cfg, mesh=None):
    """pair(gate, up, x_BTD) -> both Linears' ([B,T,F], [B,T,F]).

    On one GPU by one product, which reads x once and sums its gradient inside: 5.5 % fewer bytes a
    step at 1.4B. On 8 with fsdp the collectives would take 15 % longer (jaxtrain.plan, jax 0.10.2).
    The weights are two parameters, stepped and stored apart, either way.
    """
    if dense != "plain" or cfg.bias or mesh is not None:
        return lambda gate, up, x_BTD: (gate(x_BTD), up(x_BTD))

    def pair(gate, up, x_BTD):
        w_DNF = jnp.stack([gate.w[...], up.w[...]], 1)
        y_BTNF = jnp.einsum("BTD,DNF->BTNF", x_BTD, w_DNF)
        return y_BTNF[:, :, 0], y_BTNF[:, :, 1]

    return pair


class Norm(nnx.Module):
    """RMS or layer norm, inside in at least float32, where bf16 would lose the mean square."""

    def __init__(self, cfg, axes):
        self.cfg = cfg
        self.gain = param(cfg, axes, mean=1.0)
        if cfg.norm == "layer" and cfg.bias:
            self.bias = param(cfg, axes)

    def __call__(self, x_XD):
        x = x_XD.astype(jnp.promote_types(x_XD.dtype, jnp.float32))
        if self.cfg.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.cfg.norm_eps)
        x = x * self.gain[...]
        if self.cfg.norm == "layer" and self.cfg.bias:
            x = x + self.bias[...]
        return x.astype(x_XD.dtype)


class HeadNorm(nnx.Module):
    """RMS norm of each head's query or key. Source: https://arxiv.org/abs/2010.04245."""

    def __init__(self, cfg):
        self.eps = cfg.norm_eps
        self.gain = param(cfg, "L|K", mean=1.0)

    def __call__(self, x_BTHK):
        x = x_BTHK.astype(jnp.promote_types(x_BTHK.dtype, jnp.float32))
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return (x * self.gain[...]).astype(x_BTHK.dtype)


class Linear(nnx.Module):
    """[B,T,inputs] -> [B,T,outputs] with a matrix `w` and, with model.bias, a bias `b`."""

    def __init__(self, cfg, axes, std, dense):
        parsed = Axes.parse(axes)
        self.dense = dense
        self.w = param(cfg, axes, std)
        if cfg.bias:
            self.b = param(cfg, f"{parsed.stack}|{parsed.outputs}")
        self.has_bias = cfg.bias
        self.in_dims, self.out_dims = len(parsed.inputs), len(parsed.outputs)

    def __call__(self, x):
        w = self.w[...]
        ins, outs = w.shape[: self.in_dims], w.shape[self.in_dims :]
        x_BTI = x.reshape(*x.shape[:2], -1)
        w_IO = w.reshape(x_BTI.shape[-1], -1)
        assert ins == x.shape[2:], f"{x.shape} does not end in {ins}"
        b_O = self.b[...].reshape(-1) if self.has_bias else None
        return DENSE[self.dense](x_BTI, w_IO, b_O).reshape(*x.shape[:2], *outs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(w_VD, tokens_BT, dtype, place):
    """Rows of a table in dtype, [B,T,D]; the table's gradient is summed in its own type.

    Left to JAX, a frequent token's gradients are added up in bfloat16, of which most are lost.

    Args:
        place: constrains the placement of the narrow table, [V,D].
    """
    return place(w_VD.astype(dtype))[tokens_BT]


def _lookup_forward(w_VD, tokens_BT, dtype, place):
    like_VD = jnp.zeros_like(w_VD)  # for its shape and type; never computed
    return lookup(w_VD, tokens_BT, dtype, place), (like_VD, tokens_BT)


def _lookup_backward(dtype, place, residuals, g_BTD):
    like_VD, tokens_BT = residuals
    return like_VD.at[tokens_BT].add(g_BTD.astype(like_VD.dtype)), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def rotate(x_BTHK, cos_TK, sin_TK):
    """Rotary position, halves rotated (the layout of Hugging Face's Llama).

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    x = x_BTHK.astype(cos_TK.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    out = x * cos_TK[:, None] + turned * sin_TK[:, None]
    return out.astype(x_BTHK.dtype)


def rope_tables(cfg, positions):
    """cos and sin, [T,K] each, of integer positions [T], in at least float32."""
    dtype = jnp.float64 if cfg.dtype == "float64" else jnp.float32
    wavelength_K = cfg.rope_theta ** (jnp.arange(0, cfg.K, 2, dtype=dtype) / cfg.K)
    angle_TK = positions[:, None].astype(dtype) / wavelength_K
    angle_TK = jnp.concatenate([angle_TK, angle_TK], axis=-1)
    return jnp.cos(angle_TK), jnp.sin(angle_TK)


class Attention(nnx.Module):
    def __init__(self, cfg, dense, turn):
        self.turn = turn
        self.q = Linear(cfg, "L|D->HK", small_std(cfg), dense)
        self.k = Linear(cfg, "L|D->GK", small_std(cfg), dense)
        self.v = Linear(cfg, "L|D->GK", small_std(cfg), dense)
        self.o = Linear(cfg, "L|HK->D", residual_std(cfg), dense)
        self.q_norm = HeadNorm(cfg) if cfg.qk_norm else None
        self.k_norm = HeadNorm(cfg) if cfg.qk_norm else None

    def __call__(self, x_BTD, rope, mix):
        """mix: (q_BTHK, k_BTGK, v_BTGK) -> (o_BTHK, extra); returns ([B,T,D], extra)."""
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        q, k = self.turn(self.q_norm, q, rope), self.turn(self.k_norm, k, rope)
        o_BTHK, extra = mix(q, k, v)
        return self.o(o_BTHK), extra


class Mlp(nnx.Module):
    def __init__(self, cfg, dense, pair):
        self.form, self.pair = cfg.mlp, pair
        if cfg.mlp == "swiglu":
            self.gate = Linear(cfg, "L|D->F", small_std(cfg), dense)
        self.up = Linear(cfg, "L|D->F", small_std(cfg), dense)
        self.down = Linear(cfg, "L|F->D", residual_std(cfg), dense)

    def __call__(self, x_BTD):
        if self.form == "swiglu":  # https://arxiv.org/abs/2002.05202
            gate, up = self.pair(self.gate, self.up, x_BTD)
            return self.down(jax.nn.silu(gate) * up)
        up = self.up(x_BTD)
        if self.form == "gelu":  # the tanh form, as GPT-2
            return self.down(jax.nn.gelu(up, approximate=True))
        return self.down(jnp.square(jax.nn.relu(up)))  # https://arxiv.org/abs/2109.08668


class Block(nnx.Module):
    """One layer, pre-norm: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, cfg, dense, join, turn, pair):
        self.join = join
        self.attention_norm = Norm(cfg, "L|D")
        self.attention = Attention(cfg, dense, turn)
        self.mlp_norm = Norm(cfg, "L|D")
        self.mlp = Mlp(cfg, dense, pair)

    def __call__(self, h_BTD, rope, mix):
        """Returns ([B,T,D], whatever mix returned beside its output)."""
        h_BTD, n_BTD = self.join(self.attention_norm, h_BTD)
        y_BTD, extra = self.attention(n_BTD, rope, mix)
        h_BTD, n_BTD = self.join(self.mlp_norm, h_BTD, y_BTD)
        return h_BTD + self.mlp(n_BTD), extra


def embed_std(cfg) -> float:
    """Small; where the head shares the embedding, small enough that the first loss is ln V.

    A tied head's logits have variance D * std**2, and the first loss is ln V plus half of it:
    SmallInit's 0.4 would be 0.2 nats, this is 0.03.
    """
    return 0.25 / cfg.D**0.5 if cfg.tied else small_std(cfg)


class Transformer(nnx.Module):
    """All parameters; the forward pass over them is in transformer.py."""

    def __init__(self, cfg, dense, join, turn, pair):
        self.embed = param(cfg, "V|D", embed_std(cfg))
        if cfg.position == "learned":
            self.positions = param(cfg, "T|D", embed_std(cfg))
        self.blocks = Block(cfg, dense, join, turn, pair)
        self.final_norm = Norm(cfg, "|D")
        if not cfg.tied:  # logits of standard deviation 1/sqrt(D): the first loss is ln V
            self.head = param(cfg, "|V<-D", 1 / cfg.D)

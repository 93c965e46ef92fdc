"""The contests of bench: each compares our kernel with other implementations of an op at one shape.

All contestants of a contest are functions of the same random arrays and return the same results. An
implementation that is not installed, or that the device does not support, is left out.
torch_contests.py has PyTorch's contestants.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm import add_norm, add_norm_reference
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
from pallas_kernels.head_scores import head_scores, head_scores_reference
from pallas_kernels.qk_rope import qk_rope, qk_rope_reference
from pallas_kernels.symmetric import symmetric, symmetric_reference

KERNEL = "kernel"  # our kernel's name among the contestants


class Contest(NamedTuple):
    """One op at one shape and direction."""

    op: str  # of kernel_choice.OPS
    name: str
    shape: tuple  # as in kernel_choice.BenchRow
    arrays: Callable[[jax.Array], list[jax.Array]]  # random key -> every contestant's arguments
    contestants: Callable[[Any], dict[str, Callable]]  # tiles -> {name: function}
    flops: float
    hbm_bytes: float


class Sizes(NamedTuple):
    """The shapes of all contests; by default those that the shipped models need.

    They are llama_135m, gpt_124m, gpt_350m, gpt_774m, gpt_1558m and llama_1400m, in the order of D.
    The GPT models share a shape of attention, whose speed does not depend on the number of heads.
    """

    attention: tuple = (  # B, T, H, G, K
        (8, 1_024, 12, 12, 64),
        (4, 2_048, 16, 4, 128),
        (8, 2_048, 9, 3, 64),
        (2, 4_096, 16, 4, 128),  # of no shipped model
    )
    norm: tuple = tuple((8_192, D) for D in (576, 768, 1_024, 1_280, 1_600, 2_048))  # N, D
    qk_rope: tuple = ((8, 1_024, 12, 64), (4, 2_048, 16, 128))  # B, T, H, K
    head: tuple = (  # N, D, V
        (1_024, 576, 49_152),
        *((1_024, D, 50_304) for D in (768, 1_024, 1_280, 1_600, 2_048)),
    )
    square: tuple = (  # X, M, N
        (30, 576, 576),
        (12, 768, 768),
        (24, 1_024, 1_024),
        (36, 1_280, 1_280),
        (48, 1_600, 1_600),
        (26, 2_048, 2_048),
    )


TINY = Sizes(
    ((1, 128, 2, 1, 64),), ((64, 128),), ((2, 32, 2, 64),), ((64, 64, 256),), ((1, 64, 64),)
)


def _normal(key, *shapes):
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def _with_gradients(forward, count, inputs):
    """Returns a function of inputs and cotangents that computes `forward` and gradients.

    Args:
        count: how many of the inputs, from the first on, get a gradient.
        inputs: how many inputs there are.
    """

    def both_ways(*arrays):
        tables, cotangents = arrays[count:inputs], arrays[inputs:]
        out, pullback = jax.vjp(lambda *x: forward(*x, *tables), *arrays[:count])
        return out, pullback(cotangents if isinstance(out, tuple) else cotangents[0])

    return both_ways


def _vendors_attention():
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    if importlib.util.find_spec("tokamax") is None:
        return {"cudnn": cudnn}
    import tokamax  # pyright: ignore[reportMissingImports] - optional

    attention = lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True)
    return {"cudnn": cudnn, "tokamax": attention}


def _attention(size, backward, interpret):
    B, T, H, G, K = size

    def contestants(tiles):
        functions = {
            KERNEL: lambda q, k, v: flash_attention(q, k, v, None, None, tiles, interpret),
            "xla": flash_attention_reference,
        }
        if not interpret:
            functions |= _vendors_attention()
        if backward:
            return {name: _with_gradients(f, 3, 3) for name, f in functions.items()}
        return {name: lambda q, k, v, do, f=f: f(q, k, v) for name, f in functions.items()}

    shapes = (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)
    forward_flops = 2 * B * H * K * T * (T + 1)
    return Contest(
        "attention",
        f"attention {'both ways' if backward else 'forward'} {B}x{T}x{H}:{G}x{K}",
        size,
        lambda key: _normal(key, *shapes),
        contestants,
        forward_flops * (3.5 if backward else 1),  # the backward's usual count: 2.5
        4 * B * T * K * (H + G) * (2 if backward else 1),
    )


def _norm(size, interpret):
    N, D = size

    def contestants(tiles):
        del tiles
        kernel = lambda h, y, gain: add_norm(h, y, gain, None, "rms", 1e-6, interpret)
        reference = lambda h, y, gain: add_norm_reference(h, y, gain, None, "rms", 1e-6)
        return {KERNEL: _with_gradients(kernel, 3, 3), "xla": _with_gradients(reference, 3, 3)}

    def arrays(key):
        h, y, ds, dn = _normal(key, *[(N, D)] * 4)
        return [h, y, jnp.ones(D), ds, dn]

    return Contest("norm", f"norm both ways {N}x{D}", (D,), arrays, contestants, 0, 16 * N * D)


def _qk_rope(size, interpret):
    B, T, H, K = size

    def contestants(tiles):
        del tiles
        kernel = lambda *args: qk_rope(*args, 1e-6, interpret)
        reference = functools.partial(qk_rope_reference, eps=1e-6)
        return {KERNEL: _with_gradients(kernel, 2, 4), "xla": _with_gradients(reference, 2, 4)}

    def arrays(key):
        angle_TK = jnp.tile(jnp.arange(T)[:, None] * 1e4 ** -jnp.linspace(0, 1, K // 2), 2)
        x, dy = _normal(key, size, size)
        return [x, jnp.ones(K), jnp.cos(angle_TK), jnp.sin(angle_TK), dy]

    hbm_bytes = 10 * B * T * H * K + 8 * T * K
    name = f"qk_rope both ways {B}x{T}x{H}x{K}"
    return Contest("qk_rope", name, (K,), arrays, contestants, 0, hbm_bytes)


def _head(size, interpret):
    N, D, V = size

    def losses(compute_scores):
        """Returns a function that computes nats and gradients as the training loss does."""

        def nats_and_gradients(h, w, targets):
            scores = compute_scores(h, w, targets)
            lse_N = scores.top_N + jnp.log(scores.total_N)
            p_NV = jnp.exp(scores.logits_NV - lse_N[:, None])
            d_NV = (p_NV - jax.nn.one_hot(targets, V)).astype(h.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            dh_ND, dw_VD = product("NV,VD->ND", d_NV, w), product("NV,ND->VD", d_NV, h)
            return lse_N - scores.hit_N, dh_ND, dw_VD

        return nats_and_gradients

    def contestants(tiles):
        tile = tiles["head"] if tiles else None
        kernel = lambda h, w, y: head_scores(h, w, y, tile, interpret=interpret)
        return {KERNEL: losses(kernel), "xla": losses(head_scores_reference)}

    def arrays(key):
        return [*_normal(key, (N, D), (V, D)), jax.random.randint(key, (N,), 0, V)]

    hbm_bytes = 2 * (N + V) * D * 3 + 10 * N * V
    name = f"head both ways {N}x{D}x{V}"
    return Contest("head", name, (D, V), arrays, contestants, 6 * N * D * V, hbm_bytes)


def _square(size, interpret):
    X, M, N = size

    def contestants(tiles):
        def kernel(x):
            gram = symmetric(x, tiles=tiles["square"], interpret=interpret)
            sums = tiles["square_sum"]
            return symmetric(gram, gram, gram, (2.0, -1.5), tiles=sums, interpret=interpret)

        def reference(x):
            gram = symmetric_reference(x)
            return symmetric_reference(gram, gram, gram, (2.0, -1.5))

        return {KERNEL: kernel, "xla": reference}

    flops = X * M * M * (N + M)  # of one triangle
    name = f"square and quintic {X}x{M}x{N}"
    return Contest(
        "square",
        name,
        (M,),
        lambda key: [x / N**0.5 for x in _normal(key, (X, M, N))],
        contestants,
        flops,
        2 * X * (M * N + 3 * M * M),
    )


def build_contests(sizes: Sizes = Sizes(), interpret: bool = False) -> list[Contest]:  # noqa: B008
    """Returns all contests, the most expensive first.

    Args:
        interpret: runs on any device, without the vendors' libraries.
    """
    return [
        *(
            _attention(s, backward, interpret)
            for s in sizes.attention
            for backward in (True, False)
        ),
        *(_head(s, interpret) for s in sizes.head),
        *(_square(s, interpret) for s in sizes.square),
        *(_norm(s, interpret) for s in sizes.norm),
        *(_qk_rope(s, interpret) for s in sizes.qk_rope),
    ]

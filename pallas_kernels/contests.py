"""The contests of bench: each compares our kernel with other implementations of an op at one shape.

All contestants of a contest are functions of the same random arrays and return the same results. An
implementation that is not installed, or that the device does not support, is left out.
torch_contests.py has PyTorch's contestants; correctness.py compares all with float64.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from pallas_kernels.call_flops import visible_pairs
from pallas_kernels.contest import ATTENTION, HALF, NATS, Contest, normal, wide, with_gradients
from pallas_kernels.contest_sizes import Sizes
from pallas_kernels.flash_attention import flash_attention, flash_attention_reference
from pallas_kernels.gelu import gelu, gelu_reference
from pallas_kernels.gelu_xla import gelu_xla
from pallas_kernels.head_scores import (
    REFERENCE_SHIFT,
    head_gradients,
    head_scores,
    target_logits,
)
from pallas_kernels.norm_contests import layer_norm_contest, norm_contest
from pallas_kernels.qk_rope import qk_rope, qk_rope_reference
from pallas_kernels.symmetric import symmetric, symmetric_reference


def _vendors_attention(window):
    cudnn = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,  # keys before a query and after it
        implementation="cudnn",
    )
    if window or importlib.util.find_spec("tokamax") is None:
        return {"cudnn": cudnn}
    import tokamax  # pyright: ignore[reportMissingImports] - optional

    attention = lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True)
    return {"cudnn": cudnn, "tokamax": attention}


def _draw_documents(key, B, T):
    """Returns the document of each token; documents have 512 tokens on average."""
    starts = jax.random.bernoulli(key, 1 / 512, (B, T))
    return jnp.cumsum(starts, 1, dtype=jnp.int32)


def _attention(size, backward, interpret, documents=False, window=0):
    (B, T, H, G, K), last = size, window or None

    def both_or_one(attend):  # attend(q, k, v, documents or None)
        def run(q, k, v, do, docs=None):
            function = lambda q, k, v: attend(q, k, v, docs)
            return with_gradients(function, 3, 3)(q, k, v, do) if backward else function(q, k, v)

        return run

    def kernel(tiles):
        attend = lambda q, k, v, docs: flash_attention(q, k, v, docs, docs, tiles, interpret, last)
        return both_or_one(attend)

    others = {"xla": lambda q, k, v, docs: flash_attention_reference(q, k, v, docs, docs, last)}
    if not interpret and not documents:  # the vendors' have no documents
        for name, attend in _vendors_attention(window).items():
            others[name] = lambda q, k, v, docs, attend=attend: attend(q, k, v)
    others = {name: both_or_one(attend) for name, attend in others.items()}

    def arrays(key):
        shapes = (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)
        return [*normal(key, *shapes), *([_draw_documents(key, B, T)] if documents else [])]

    forward_flops = 4 * B * H * K * visible_pairs(T, T, last)  # of documents, an upper bound
    masked = ", documents" * documents + (f", window {window}" if window else "")
    return Contest(
        "attention",
        f"attention{masked} {'both ways' if backward else 'forward'} {B}x{T}x{H}:{G}x{K}",
        size,
        arrays,
        kernel,
        others,
        lambda *arrays: others["xla"](*wide(*arrays)),
        (ATTENTION,) * (4 if backward else 1),
        forward_flops * (3.5 if backward else 1),  # the backward's usual count: 2.5
        4 * B * T * K * (H + G) * (2 if backward else 1),
        documents,
        window,
    )


def _qk_rope(size, interpret):
    B, T, H, K = size
    reference = functools.partial(qk_rope_reference, eps=1e-6)

    def kernel(tiles):
        del tiles
        fused = lambda x, gain, cos, sin: qk_rope(x, gain, cos, sin, 1e-6, interpret)
        return with_gradients(fused, 2, 4)

    def arrays(key):
        angle_TK = jnp.tile(jnp.arange(T)[:, None] * 1e4 ** -jnp.linspace(0, 1, K // 2), 2)
        x, dy = normal(key, size, size)
        return [x, jnp.ones(K), jnp.cos(angle_TK), jnp.sin(angle_TK), dy]

    return Contest(
        "qk_rope",
        f"qk_rope both ways {B}x{T}x{H}x{K}",
        (K,),
        arrays,
        kernel,
        {"xla": with_gradients(reference, 2, 4)},
        lambda *arrays: with_gradients(reference, 2, 4)(*wide(*arrays)),
        (HALF, HALF, NATS),
        0,
        10 * B * T * H * K + 8 * T * K,
    )


def _gelu(size, interpret):
    N, F = size

    def kernel(tiles):
        return with_gradients(lambda x, bias: gelu(x, bias, tiles, interpret), 2, 2)

    def arrays(key):
        x, dy, bias = normal(key, (N, F), (N, F), (F,))
        return [x, bias.astype(jnp.float32), dy]

    return Contest(
        "gelu",
        f"gelu both ways {N}x{F}",
        (F,),
        arrays,
        kernel,
        {"xla": with_gradients(gelu_xla, 2, 2)},
        lambda *arrays: with_gradients(gelu_reference, 2, 2)(*wide(*arrays)),
        (HALF, HALF, HALF),  # the bias' gradient is the sum of rounded ones
        0,
        10 * N * F,
    )


def _head(size, interpret):
    N, D, V = size

    def losses(compute_scores):
        """Returns a function that computes nats and gradients as the training loss does."""

        def nats_and_gradients(h, w, targets):
            logit_N = target_logits(h, w, targets)
            reference_N = logit_N + REFERENCE_SHIFT
            scores = compute_scores(h, w, reference_N)
            nats_N = reference_N + jnp.log(scores.total_N) - logit_N
            weight_N = jnp.ones_like(nats_N)
            kept_NV, total_N = scores.kept_NV, scores.total_N
            return nats_N, *head_gradients(kept_NV, h, w, targets, weight_N, total_N)

        return nats_and_gradients

    def kernel(tiles):
        keep = "exponentials"  # as the training loss does
        return losses(
            lambda h, w, r: head_scores(h, w, r, tiles and tiles["head"], 0.0, keep, interpret)
        )

    def xla(h, w, targets):
        sums = jnp.promote_types(h.dtype, jnp.float32)
        product = functools.partial(jnp.einsum, preferred_element_type=sums)
        logits_NV, onehot_NV = product("ND,VD->NV", h, w), jax.nn.one_hot(targets, V, dtype=sums)
        lse_N = jax.nn.logsumexp(logits_NV, 1)
        d_NV = (jnp.exp(logits_NV - lse_N[:, None]) - onehot_NV).astype(h.dtype)
        nats_N = lse_N - (onehot_NV * logits_NV).sum(1)
        return nats_N, product("NV,VD->ND", d_NV, w), product("NV,ND->VD", d_NV, h)

    def arrays(key):  # logits have about unit variance, as a trained model's do
        h, w = normal(key, (N, D), (V, D))
        return [h, (w * D**-0.5).astype(w.dtype), jax.random.randint(key, (N,), 0, V)]

    return Contest(
        "head",
        f"head both ways {N}x{D}x{V}",
        (D, V),
        arrays,
        kernel,
        {"xla": xla},
        lambda *arrays: xla(*wide(*arrays)),
        (NATS, HALF, HALF),
        6 * N * D * V,
        2 * (N + V) * D * 3 + 6 * N * V,
    )


def _square(size, interpret):
    X, M, N = size

    def quintic(gram):
        return symmetric_reference(gram, gram, gram, (2.0, -1.5))

    def kernel(tiles):
        def gram_and_quintic(x):
            gram = symmetric(x, tiles=tiles["square"], interpret=interpret)
            sums = tiles["square_sum"]
            return symmetric(gram, gram, gram, (2.0, -1.5), tiles=sums, interpret=interpret)

        return gram_and_quintic

    def exact(x):  # the second product starts from the rounded first one, as everywhere
        (x_wide,) = wide(x)
        (gram,) = wide(symmetric_reference(x_wide).astype(x.dtype))
        return quintic(gram)

    return Contest(
        "square",
        f"square and quintic {X}x{M}x{N}",
        (M,),
        lambda key: [x / N**0.5 for x in normal(key, (X, M, N))],
        kernel,
        {"xla": lambda x: quintic(symmetric_reference(x))},
        exact,
        (HALF,),
        X * M * M * (N + M),  # of one triangle
        2 * X * (M * N + 3 * M * M),
    )


def build_contests(sizes: Sizes = Sizes(), interpret: bool = False) -> list[Contest]:  # noqa: B008
    """Returns all contests, op by op.

    Args:
        interpret: runs on any device, without the vendors' libraries.
    """
    directions = (True, False)  # whether the backward is included
    longer = [
        _attention(s, backward, interpret, window=window)
        for s, windows in sizes.longer
        for window in windows
        for backward in (directions if not window else (True,))
    ]
    norms = [norm_contest(s, interpret) for s in sizes.norm]
    of_layer_norm = {(D,) for _, D in sizes.layer_norm}
    return [
        *(_attention(s, backward, interpret) for s in sizes.attention for backward in directions),
        *(_attention(s, True, interpret, documents=True) for s in sizes.documents),
        *(contest._replace(shipped=False) for contest in longer),
        *(_head(s, interpret) for s in sizes.head),
        *(_square(s, interpret) for s in sizes.square),
        *(x._replace(in_table=x.shape not in of_layer_norm) for x in norms),
        *(layer_norm_contest(s, interpret) for s in sizes.layer_norm),
        *(_gelu(s, interpret) for s in sizes.gelu),
        *(_qk_rope(s, interpret) for s in sizes.qk_rope),
    ]

"""The kernels and shapes that pallas_kernels.audit compiles, and the requirements for each."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm import add_norm
from pallas_kernels.call_flops import ATTENTION_WORK, STORED_WORK, visible_pairs
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.gelu import gelu
from pallas_kernels.head_scores import head_scores
from pallas_kernels.qk_rope import qk_rope
from pallas_kernels.symmetric import symmetric
from pallas_kernels.tiles import MosaicAttentionTiles


class Case(NamedTuple):
    """One kernel at one shape, and the requirements for its compiled form."""

    name: str  # of the kernel in the compiled program
    shape: str
    build: Callable[[Any], tuple[Callable, tuple]]  # the op's tiles -> (function, abstract inputs)
    hbm_bytes: float
    flops: float
    floor: int  # the fewest blocks that must fit on a multiprocessor
    tensor_core: bool = False
    op: str = "norm"
    kernel: str = ""  # its name in the op's tiles; "" for a kernel without tiles
    only_body: str = ""  # the only body that is compiled at this shape
    why_only: str = ""
    build_all: Callable | None = None  # like build, but of all kernels of the op at this shape
    # B, T, H, G, K of attention; N, D, V of head; X, M, N of square; N, F of GELU; N, D of norm
    sizes: tuple[int, ...] = ()
    tiles: Any = None  # the kernel's, in place of its body's default
    window: int | None = None  # how many keys a query of attention sees; None: all
    budget: float = 0.0  # the most arithmetic instructions a score in the leanest loop; 0: any
    mosaic_budget: float = 0.0  # the same for Hopper's Mosaic body
    # The most arithmetic instructions of the entire kernel for each element of a block; 0: any. All
    # its accesses to memory must then be of 16 bytes a thread.
    element_budget: float = 0.0

    @property
    def K(self) -> int:
        """The width of attention's heads."""
        return self.sizes[-1]


# Maximum, FMA, exp2, sum and half a conversion make 4.5 in the forward; FMA, exp2, subtraction,
# product and conversions 5 for dk and dv, 4.5 for dq. The rest is for addresses and rows.
# The tiles of dk and dv on an H100 have 64 keys for two warp groups, which both compute the scores.
BUDGETS = {"forward": 6.0, "dkv": 13.0, "dq": 5.5}
# Of the forward's Mosaic body for Ampere, which also computes the slots and addresses of its ring
# (6.5 at K=128 and 6.8 at K=64, jax 0.11.2).
AMPERE_FORWARD_BUDGET = 7.0
# Of Hopper's Mosaic bodies: without documents, with documents, and with a window too. Their dk, dv
# and dq, and their forward with documents, have one loop, which always masks. These are ceilings,
# as counted on 2026-11-27 with jax 0.11.2; docs/kernels.md has the targets that they miss.
MOSAIC_BUDGETS = {
    "forward": (6.02, 12.25, 13.75),
    "dkv": (9.0, 12.0, 13.5),
    "dq": (9.0, 12.5, 14.5),
}
# The most cycles for which Triton's backward on an A40 keeps shared memory busy for 32 scores, by
# kernel and K: ceilings, as counted on 2026-11-27 with jax 0.10.2 and 0.11.2.
SHARED_CEILINGS = {("dkv", 128): 31.4, ("dq", 128): 17.0, ("dkv", 64): 12.2, ("dq", 64): 8.0}

ELEMENT_BUDGETS = {"gelu": 11.25, "gelu_backward": 24.5}  # as counted on 2026-11-28, rounded up

# kernel -> D -> the fewest programs that fit on a multiprocessor, as counted on 2026-11-28
NORM_FLOORS = {
    "norm": {768: 5, 1_024: 4, 1_280: 5, 1_600: 4, 2_048: 4, 5_632: 2, 8_192: 2},
    "norm_backward": {768: 2, 1_024: 3, 1_280: 2, 1_600: 4, 2_048: 4, 5_632: 1, 8_192: 1},
}


def _array(*shape, dtype: Any = jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _norm_case(backward, N, D, floor):
    """Returns a case of layer norm with all biases, which needs the most registers."""

    def build(tiles):
        x, vector = _array(N, D), _array(D, dtype=jnp.float32)

        def add_layer_norm(h, y, gain, bias, y_bias):
            return add_norm(h, y, gain, bias, "layer", y_bias_D=y_bias, tiles=tiles)

        given = x, x, vector, vector, vector
        if not backward:
            return add_layer_norm, given
        gradients = lambda *args: jax.vjp(add_layer_norm, *args[:5])[1](tuple(args[5:]))
        return gradients, (*given, x, x)

    direction, kernel = ("backward", "norm_backward") if backward else ("forward", "norm")
    case = Case(f"add_norm_{direction}", f"{N}x{D} bf16", build, 4 * N * D * 2, 0.0, floor)
    return case._replace(kernel=kernel, sizes=(N, D))


def _qk_rope_case(B, T, H, K, floor):
    def build(tiles):
        del tiles
        x = _array(B, T, H, K)
        gain, table = (_array(*shape, dtype=jnp.float32) for shape in ((K,), (T, K)))

        def gradients(x, gain, cos, sin, dy):
            return jax.vjp(lambda x, gain: qk_rope(x, gain, cos, sin), x, gain)[1](dy)

        return gradients, (x, gain, table, table, x)

    shape, hbm_bytes = f"{B}x{T}x{H}x{K} bf16", 6 * B * T * H * K + 4 * T * K
    return Case("qk_rope_backward", shape, build, hbm_bytes, 0.0, floor, op="qk_rope")


def _gelu_case(backward, N, F, floor):
    """Returns a case of GELU with a bias.

    An element of the forward takes 2 FMA and ALU instructions to unpack x and add the bias, 5 for
    the sigmoid besides ex2 and rcp, 1 product and half a conversion. The backward takes 3 to unpack
    x, dy and the rounded dx, 13 for the gradient, and 2 for the sums; and at the end it adds its
    threads' sums, as often as it has columns.
    """

    def build(tiles):
        x, bias = _array(N, F), _array(F, dtype=jnp.float32)
        if not backward:
            return lambda x, bias: gelu(x, bias, tiles), (x, bias)
        gradients = lambda x, bias, dy: jax.vjp(lambda x, bias: gelu(x, bias, tiles), x, bias)[1](
            dy
        )
        return gradients, (x, bias, x)

    direction, kernel = ("backward", "gelu_backward") if backward else ("forward", "gelu")
    hbm_bytes = 2 * N * F * (3 if backward else 2)
    case = Case(f"bias_gelu_{direction}", f"{N}x{F} bf16", build, hbm_bytes, 0.0, floor)
    budget = ELEMENT_BUDGETS[kernel]
    return case._replace(op="gelu", kernel=kernel, sizes=(N, F), element_budget=budget)


def _symmetric_case(X, M, N, floor, adds=False):
    kernel = "square_sum" if adds else "square"

    def build(tiles):
        x, c = (_array(X, M, size) for size in (N, M))
        if not adds:
            return lambda x: symmetric(x, tiles=tiles[kernel]), (x,)
        scale = _array(dtype=jnp.float32)
        product = lambda x, c, a, b: symmetric(x, x, c, (a, b), tiles=tiles[kernel])
        return product, (x, c, scale, scale)

    hbm_bytes, flops = 2 * X * (M * N + M * M * (1 + adds)), X * M * (M + 1) * N
    name = "symmetric_sum" if adds else "symmetric"
    case = Case(name, f"{X}x{M}x{N} bf16", build, hbm_bytes, flops, floor, True, "square", kernel)
    return case._replace(sizes=(X, M, N))


def _head_case(N, D, V, keep, softcap=0.0):
    def build(tiles):
        h, w = (_array(rows, D) for rows in (N, V))
        scores = lambda h, w, r: head_scores(h, w, r, tiles["head"], softcap, keep)
        return scores, (h, w, _array(N, dtype=jnp.float32))

    hbm_bytes = 2 * (N + V) * D + {"": 0, "exponentials": 2, "logits": 4}[keep] * N * V
    shape, flops = f"{N}x{D}x{V} bf16", 2 * N * D * V
    case = Case("head_scores", shape, build, hbm_bytes, flops, 1, True, "head", "head")
    case = case._replace(sizes=(N, D, V))
    if keep and V % 32:
        why = "because the length of its logits' rows is not a multiple of 32"
        return case._replace(only_body="triton", why_only=why)
    return case


@functools.cache  # the audit compiles a program once for all cases that share it
def _attention_program(kernels, B, T, H, G, K, documents, window):
    def build(blocks):
        q, k = (_array(B, T, heads, K) for heads in (H, G))
        docs = _array(B, T, dtype=jnp.int32) if documents else None

        def compute(q, k, v, do, docs):
            attend = lambda q, k, v: flash_attention(q, k, v, docs, docs, blocks, window=window)
            o, pullback = jax.vjp(attend, q, k, v)
            dq, dk, dv = pullback(do)
            results = {"forward": o, "dkv": (dk, dv), "dq": dq}
            return [results[kernel] for kernel in kernels]  # XLA removes the others

        return compute, (q, k, k, q, docs)

    return build


def _attention_case(kernel, B, T, H, G, K, documents=True, window=None):
    """Returns the case of one attention kernel.

    Without documents only the Mosaic body is compiled: it then has a branch that skips the mask.
    """
    sizes = B, T, H, G, K
    flops = ATTENTION_WORK[kernel] * 4 * B * H * K * visible_pairs(T, T, window)
    hbm_bytes = 2 * B * T * K * (2 * H + 2 * G) * (2 if kernel == "dkv" else 1)
    shape = f"{B}x{T}x{H}:{G}x{K} {f'W={window}' if window else 'bf16'}{' docs' * documents}"
    name = f"flash_attention_{kernel}"
    build, build_all = (
        _attention_program(names, *sizes, documents, window)
        for names in ((kernel,), tuple(ATTENTION_WORK))
    )
    case = Case(name, shape, build, hbm_bytes, flops, 1, True, "attention", kernel)
    masks = (2 if window else 1) if documents else 0
    budgets = {"budget": BUDGETS[kernel], "mosaic_budget": MOSAIC_BUDGETS[kernel][masks]}
    case = case._replace(build_all=build_all, sizes=sizes, window=window, **budgets)
    if documents:
        return case
    why = "because Triton's body needs fewer registers without documents than with them"
    return case._replace(only_body="mosaic", why_only=why)


def _stored_case(B, T, H, G, K):
    """Returns the case of attention's kernel of dq that reads the scores' gradients."""

    def build(blocks):
        from pallas_kernels import flash_attention_mosaic_stored as stored  # not every JAX has it

        q, k, ds = _array(B, T, H, K), _array(B, T, G, K), _array(B, H, T, T)
        dq = lambda ds, q, k: stored.dq_from_stored(ds, q, k, blocks.dq, False, None)
        return dq, (ds, q, k)

    flops = STORED_WORK * 4 * B * H * K * visible_pairs(T, T)
    hbm_bytes = 2 * B * (H * visible_pairs(T, T) + T * K * (H + G))
    shape = f"{B}x{T}x{H}:{G}x{K} bf16"
    case = Case("flash_attention_dq_stored", shape, build, hbm_bytes, flops, 1, True, "attention")
    tiles, why = MosaicAttentionTiles(256, 64, 3, variant="stored"), "which stores the gradients"
    only = {"kernel": "dq", "only_body": "mosaic", "why_only": why, "tiles": tiles}
    return case._replace(sizes=(B, T, H, G, K), **only)


CASES = [
    *(_attention_case(name, 4, 2_048, 16, 4, 128) for name in ATTENTION_WORK),
    *(_attention_case(name, 4, 2_048, 16, 4, 128, documents=False) for name in ATTENTION_WORK),
    *(_attention_case(name, 8, 1_024, 12, 12, 64) for name in ATTENTION_WORK),
    *(_attention_case(name, 4, 2_048, 16, 4, 128, window=512) for name in ATTENTION_WORK),
    _stored_case(4, 2_048, 16, 4, 128),
    *(_norm_case(False, 32_768, D, floor) for D, floor in NORM_FLOORS["norm"].items()),
    *(_norm_case(True, 32_768, D, floor) for D, floor in NORM_FLOORS["norm_backward"].items()),
    _qk_rope_case(4, 2_048, 16, 128, floor=8),
    _qk_rope_case(8, 1_024, 12, 64, floor=8),
    *(_gelu_case(backward, 32_768, F, 4) for backward in (False, True) for F in (3_072, 5_120)),
    _head_case(1_024, 2_048, 50_304, keep="exponentials"),
    _head_case(1_024, 768, 50_257, keep="logits"),
    _head_case(1_024, 2_048, 50_304, keep="", softcap=15.0),
    _symmetric_case(26, 2_048, 2_048, floor=2),
    _symmetric_case(12, 768, 3_072, floor=2),
    _symmetric_case(26, 2_048, 2_048, floor=1, adds=True),
]


_CONTEST = re.compile(r"(attention|square)(, documents)? (forward|both ways|and quintic) (\S+)")


def contest_cases(name: str) -> list[Case] | None:
    """Returns the kernels of a contest of bench; None where other products take part in it.

    Args:
        name: such as "attention both ways 4x2048x16:4x128".
    """
    if not (match := _CONTEST.fullmatch(name)):
        return None
    op, documents, direction, shape = match.groups()
    sizes = [int(size) for size in re.findall(r"\d+", shape)]
    if op == "attention":
        kernels = ("forward",) if direction == "forward" else tuple(ATTENTION_WORK)
        return [_attention_case(kernel, *sizes, documents=bool(documents)) for kernel in kernels]
    X, M, N = sizes
    return [_symmetric_case(X, M, N, 1), _symmetric_case(X, M, M, 1, adds=True)]

"""Builds fused kernels that run on each device's part of the arrays.

Only this module calls the kernels of pallas_kernels. It imports Pallas only when a kernel is built,
because the import adds 0.1 s to a start.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.mesh import BATCH_AXES
from jaxtrain.ops.routes import Route

# op -> name of the kernel that a compiled step contains if the op's route is fused
KERNELS = {
    "attention": "flash_attention_forward",
    "norm": "add_norm_forward",
    "qk_rope": "qk_rope_backward",
    "gelu": "bias_gelu_forward",
    "head": "head_scores",
    "square": "symmetric",
}
ROWS, HEADS = P(BATCH_AXES), P(BATCH_AXES, None, "tensor")  # layouts of [B,...] and [B,T,H,K]


def missing_kernels(routes: dict[str, Route], compiled: jax.stages.Compiled) -> list[str]:
    """Returns the ops whose route is a kernel that a compiled program does not contain."""
    expected_ops = [
        op
        for op, route in routes.items()
        if op in KERNELS and route.is_fused and not route.is_interpreted
    ]
    if not expected_ops:
        return []
    text = compiled.as_text() or ""
    return [op for op in expected_ops if KERNELS[op] not in text]


def _shard_map(function, mesh, in_specs, out_specs):
    """Maps function over the devices of a mesh; on one device returns it unchanged."""
    if mesh is None or mesh.size == 1:
        return function
    # shard_map's replication check does not support Pallas calls.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def build_attention(route: Route, mesh: Mesh | None = None, window: int | None = None) -> Callable:
    """Builds attention(q_BTHK, k_BTGK, v_BTGK, docs_BT=None) -> o_BTHK.

    Args:
        mesh: splits rows over (replica, fsdp) and heads over tensor; None means one device.
        window: how many of the last tokens, itself included, a token sees; None means all.
    """
    from pallas_kernels.flash_attention import flash_attention

    def on_device(q, k, v, docs=None):
        return flash_attention(q, k, v, docs, docs, route.tiles, route.is_interpreted, window)

    def attention(q_BTHK, k_BTGK, v_BTGK, docs_BT=None):
        if docs_BT is None:
            return map_heads(on_device, mesh)(q_BTHK, k_BTGK, v_BTGK)
        mapped = _shard_map(on_device, mesh, (HEADS, HEADS, HEADS, ROWS), HEADS)
        return mapped(q_BTHK, k_BTGK, v_BTGK, docs_BT)

    return attention


def map_heads(function: Callable, mesh: Mesh | None = None) -> Callable:
    """Maps function(q_BTHK, k_BTGK, v_BTGK) over each device's rows and heads.

    cuDNN's attention needs it too. Outside shard_map JAX adds a partitioner to the call. The
    partitioner's memory address becomes part of the program, and the compile cache never hits.
    """
    return _shard_map(function, mesh, (HEADS, HEADS, HEADS), HEADS)


def build_add_norm(route: Route, form: str, eps: float, mesh: Mesh | None = None) -> Callable:
    """Builds add_norm(h_BTD, y_BTD or None, gain_D, bias_D or None, y_bias_D or None).

    It returns (h + y + y_bias, its norm).

    Args:
        form: "rms" or "layer".
    """
    from pallas_kernels.add_norm import add_norm

    def on_device(h, y, gain, bias, y_bias):
        return add_norm(h, y, gain, bias, form, eps, route.is_interpreted, y_bias, route.tiles)

    return _shard_map(on_device, mesh, (ROWS, ROWS, P(), P(), P()), (ROWS, ROWS))


def build_qk_rope(route: Route, eps: float, mesh: Mesh | None = None) -> Callable:
    """Builds qk_rope(x_BTHK, gain_K, cos_TK, sin_TK), which normalises and rotates x."""
    from pallas_kernels.qk_rope import qk_rope

    def on_device(x, gain, cos, sin):
        return qk_rope(x, gain, cos, sin, eps, route.is_interpreted)

    return _shard_map(on_device, mesh, (HEADS, P(), P(), P()), HEADS)


def build_gelu(route: Route, mesh: Mesh | None = None) -> Callable:
    """Builds gelu(x_BTF, bias_F or None) -> gelu(x + bias); F is split over tensor."""
    from pallas_kernels.gelu import gelu

    def on_device(x, bias):
        return gelu(x, bias, route.tiles, route.is_interpreted)

    wide = P(BATCH_AXES, None, "tensor")
    return _shard_map(on_device, mesh, (wide, P("tensor")), wide)


class FusedHead(NamedTuple):
    """The functions of pallas_kernels.head_scores, for one device's rows and part of V."""

    scores: Callable  # (h_ND, w_VD, reference_N, softcap, keep) -> head_scores.Scores
    gradients: Callable  # head_scores.head_gradients
    target_logits: Callable  # head_scores.target_logits
    reference_shift: float  # a row's reference, less its target's logit


def build_head(route: Route) -> FusedHead:
    """Builds the head's functions; call them inside shard_map."""
    from pallas_kernels import head_scores as head

    def scores(h_ND, w_VD, reference_N, softcap, keep):
        tiles, interpret = route.tiles["head"], route.is_interpreted
        return head.head_scores(h_ND, w_VD, reference_N, tiles, softcap, keep, interpret)

    return FusedHead(scores, head.head_gradients, head.target_logits, head.REFERENCE_SHIFT)


def build_square(route: Route) -> Callable:
    """Builds square(x_XMN, y_XMN=None, c_XMM=None, scales=(1, 0)); see pallas_kernels.symmetric.

    Call it inside shard_map: it computes one device's matrices.
    """
    from pallas_kernels.symmetric import symmetric

    def square(x_XMN, y_XMN=None, c_XMM=None, scales=(1.0, 0.0)):
        tiles = route.tiles["square" if c_XMM is None else "square_sum"]
        interpret = route.is_interpreted
        return symmetric(x_XMN, y_XMN, c_XMM, scales, tiles=tiles, interpret=interpret)

    return square

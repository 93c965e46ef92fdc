"""Fused kernels on each device's part of the arrays: the one caller of pallas_kernels.

Pallas is imported where a kernel is asked for: it costs a start 0.1 s.
"""

import jax
from jax.sharding import PartitionSpec as P

from jaxtrain.distributed.mesh import BATCH_AXES

# op -> the kernel that a compiled step holds where its route is fused
KERNELS = {
    "attention": "flash_attention_forward",
    "norm": "add_norm_forward",
    "qk_rope": "qk_rope_backward",
    "head": "head_scores",
    "square": "symmetric",
}


def missing_kernels(routes, compiled) -> list[str]:
    """Ops whose route is a kernel that a compiled program does not hold."""
    fused = [op for op, route in routes.items() if op in KERNELS and _is_fused(route)]
    if not fused:
        return []
    text = compiled.as_text()
    return [op for op in fused if KERNELS[op] not in text]


def _is_fused(route) -> bool:
    return route.implementation.startswith(("flash:", "fused:")) and not _interpreted(route)


def _interpreted(route) -> bool:
    return route.implementation.endswith(":interpret")


def _apart(local, mesh, in_specs, out_specs):
    """local on each device of a mesh; as it is where there is one device."""
    if mesh is None or mesh.size == 1:
        return local
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def build_attention(route, mesh=None):
    """attention(q_BTHK, k_BTGK, v_BTGK, docs_BT=None).

    Args:
        mesh: rows lie over (replica, fsdp), heads over tensor; None is one device.
    """
    from pallas_kernels.flash_attention import flash_attention

    def local(q, k, v, docs=None):
        return flash_attention(q, k, v, docs, docs, route.tiles, _interpreted(route))

    def attention(q_BTHK, k_BTGK, v_BTGK, docs_BT=None):
        given = (q_BTHK, k_BTGK, v_BTGK) + (() if docs_BT is None else (docs_BT,))
        heads = P(BATCH_AXES, None, "tensor")
        return _apart(local, mesh, (heads,) * 3 + (P(BATCH_AXES),) * (len(given) - 3), heads)(
            *given
        )

    return attention


def on_heads(local, mesh=None):
    """local(q_BTHK, k_BTGK, v_BTGK) on each device's rows and heads; None is one device.

    cuDNN's call has a partitioner of its own outside of this, and its address in this process in
    the program: none would ever be found in the compile cache again.
    """
    heads = P(BATCH_AXES, None, "tensor")
    return _apart(local, mesh, (heads,) * 3, heads)


def build_add_norm(route, form, eps, mesh=None):
    """join(h_BTD, y_BTD or None, gain_D, bias_D or None) -> (h + y, its norm); rows as they lie.

    Args:
        form: "rms" or "layer".
    """
    from pallas_kernels.add_norm import add_norm

    def local(*given):
        return add_norm(*given, form, eps, _interpreted(route))

    def join(h_BTD, y_BTD, gain_D, bias_D):
        rows = P(BATCH_AXES)
        return _apart(local, mesh, (rows, rows, P(), P()), (rows, rows))(
            h_BTD, y_BTD, gain_D, bias_D
        )

    return join


def build_qk_rope(route, eps, mesh=None):
    """turn(x_BTHK, gain_K, cos_TK, sin_TK) -> normed and rotated; rows and heads as they lie."""
    from pallas_kernels.qk_rope import qk_rope

    def local(*given):
        return qk_rope(*given, eps, _interpreted(route))

    heads = P(BATCH_AXES, None, "tensor")
    return _apart(local, mesh, (heads, P(), P(), P()), heads)


def build_scores(route):
    """scores(h_ND, w_VD, targets_N, softcap, keep) -> head_scores.Scores; inside shard_map."""
    from pallas_kernels.head_scores import head_scores

    def scores(h_ND, w_VD, targets_N, softcap, keep):
        tiles, interpret = route.tiles["head"], _interpreted(route)
        return head_scores(h_ND, w_VD, targets_N, tiles, softcap, keep, interpret)

    return scores


def build_square(route):
    """square(x_XMN, y_XMN=None, c_XMM=None, scales=(1, 0)) as symmetric; inside shard_map."""
    from pallas_kernels.symmetric import symmetric

    def square(x_XMN, y_XMN=None, c_XMM=None, scales=(1.0, 0.0)):
        tiles = route.tiles["square" if c_XMM is None else "square_sum"]
        return symmetric(x_XMN, y_XMN, c_XMM, scales, tiles=tiles, interpret=_interpreted(route))

    return square

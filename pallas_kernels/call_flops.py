"""FLOPs of the custom calls in a compiled program: our kernels', cuBLAS' and cuDNN's.

XLA does not know what a custom call computes, so each declares it here, and a kernel that moves
only a part of an array declares that too. Only products count, as for XLA's own instructions. Pairs
of a query and a key that the causal mask or a window hides do not count, and of a symmetric product
only one triangle does. Documents are counted as if each row were one document. The window of our
attention is part of its calls' metadata, in WINDOW_SCOPE.

Source: the attributes of cuBLAS' and cuDNN's calls are GemmBackendConfig and CudnnfMHABackendConfig
in XLA's xla/service/gpu/backend_configs.proto.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

Sizes = tuple[int, ...]

WINDOW_SCOPE = "attention_window_{}"  # the name of a scope (jax.named_scope) around the kernels
ATTENTION_WORK = {"forward": 1.0, "dkv": 2.0, "dq": 1.5}  # relative to the forward's two products
STORED_WORK = 0.5  # the same of dq from stored gradients of the scores


def visible_pairs(T: int, S: int, window: int | None = None) -> int:
    """Returns how many keys the last T of S positions see in total, causally.

    Args:
        window: how many of the keys up to its own position a query sees; None: all.
    """
    T, most = min(T, S), min(window or S, S)  # most: keys that a query sees
    first_lacks = max(most - (S - T + 1), 0)  # the next query lacks one less, and so on
    return T * most - first_lacks * (first_lacks + 1) // 2


def _attention(work):
    def flops(q_BTHK, k_BSGK, *_, window=None):
        (B, T, *H_K), S = q_BTHK, k_BSGK[1]  # Ampere's body has one dimension for H and K
        return work * 4 * B * math.prod(H_K) * visible_pairs(T, S, window)

    return flops


def _attention_stored(ds_BHST, k_BSGK, *_, window=None):
    (B, H, _, T), (S, _, K) = ds_BHST, k_BSGK[1:]  # T is padded, unless it is S
    return STORED_WORK * 4 * B * H * K * visible_pairs(T, S, window)


def _head_scores(h_ND, w_VD, *_):
    return 2 * math.prod(h_ND) * w_VD[0]


def _symmetric(x_XMN, *_):
    X, M, N = x_XMN
    return X * M * (M + 1) * N


# A kernel's name -> its FLOPs, given its operands' sizes
KERNELS: dict[str, Callable[..., float]] = {
    **{f"flash_attention_{name}": _attention(work) for name, work in ATTENTION_WORK.items()},
    "flash_attention_dq_stored": _attention_stored,
    "head_scores": _head_scores,
    "symmetric": _symmetric,
    "symmetric_sum": _symmetric,
    **dict.fromkeys(("add_norm_forward", "add_norm_backward", "qk_rope_backward"), lambda *_: 0.0),
    **dict.fromkeys(("bias_gelu_forward", "bias_gelu_backward"), lambda *_: 0.0),
}


class PartlyMoved(NamedTuple):
    """An array of a call, of which the kernel reads or writes only some elements."""

    index: int  # in operands + results
    elements: int  # that it moves


def _read_stored(operands, results, window=None):
    (B, H, *_), S, T = operands[0], operands[1][1], results[0][1]
    return PartlyMoved(0, B * H * visible_pairs(T, S, window))


def _write_stored(operands, results, window=None):
    if len(results) < 3:  # it stores no gradients of the scores
        return None
    (B, H, *_), S, T = results[2], operands[1][1], operands[0][1]
    return PartlyMoved(len(operands) + 2, B * H * visible_pairs(T, S, window))


# A kernel's name -> what it moves only in part, given its operands' and its results' sizes. Of the
# stored gradients of scores [B,H,S,T], padded, only pairs that the mask shows move.
PARTLY_MOVED: dict[str, Callable[..., PartlyMoved | None]] = {
    "flash_attention_dkv": _write_stored,
    "flash_attention_dq_stored": _read_stored,
}
PALLAS = ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")  # custom-call targets of Pallas' kernels

_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_OP_NAME = re.compile(r'op_name="([^"]+)"')
_DEPTH = re.compile(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]')
_SCORES = re.compile(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)\]')
_SCOPE = re.compile(WINDOW_SCOPE.format(r"(\d+)"))
_WINDOW = re.compile(r'"sliding_window_length": ?"?(\d+)')


def _integers(pattern, attributes):
    match = pattern.search(attributes)
    assert match, f"a custom call must have the attribute {pattern.pattern}"
    return [int(number) for number in re.findall(r"\d+", match[1])]


def _target(attributes) -> str:
    return match[1] if (match := _TARGET.search(attributes)) else ""


def _find_kernel(attributes) -> tuple[str, dict[str, int]]:
    """Returns the name in KERNELS of a Pallas kernel, and its window, if any, as an argument.

    Raises:
        ValueError: the kernel declares no FLOPs here.
    """
    op_name = match[1] if (match := _OP_NAME.search(attributes)) else ""
    names = [word for word in re.findall(r"\w+", op_name) if word in KERNELS]
    if not names:
        raise ValueError(
            "a Pallas kernel must declare its FLOPs in pallas_kernels/call_flops.py; got "
            f"op_name={op_name!r}"
        )
    windows = _SCOPE.findall(op_name)
    # An earlier name is the jitted function that contains the call.
    return names[-1], {"window": int(windows[-1])} if windows else {}


def _cudnn_attention(attributes, operands) -> float:
    B, H, T, S = _integers(_SCORES, attributes)
    pairs = T * S
    if '"CAUSAL"' in attributes:
        pairs = visible_pairs(
            T, S, int(match[1]) if (match := _WINDOW.search(attributes)) else None
        )
    products = 5 if "Backward" in attributes else 2
    return products * 2 * B * H * operands[0][-1] * pairs


def custom_call_flops(
    attributes: str, operands: Sequence[Sizes], results: Sequence[Sizes]
) -> float:
    """Returns the FLOPs of a custom call's products; 0 if it computes none.

    Args:
        attributes: the instruction's text behind its operands.
        operands, results: the sizes of each array.

    Raises:
        ValueError: a Pallas kernel declares no FLOPs.
    """
    target = _target(attributes)
    if target in PALLAS:
        kernel, window = _find_kernel(attributes)
        return KERNELS[kernel](*operands, **window)
    if target.startswith("__cublas$"):
        depth = math.prod(operands[0][dim] for dim in _integers(_DEPTH, attributes))
        return 2 * depth * math.prod(results[0])
    if target.startswith("__cudnn$fmha"):
        return _cudnn_attention(attributes, operands)
    return 0.0


def find_partly_moved(
    attributes: str, operands: Sequence[Sizes], results: Sequence[Sizes]
) -> PartlyMoved | None:
    """Returns the array of a custom call that moves only in part; None if there is none.

    Takes and raises what custom_call_flops does.
    """
    if _target(attributes) not in PALLAS:
        return None
    kernel, window = _find_kernel(attributes)
    return PARTLY_MOVED[kernel](operands, results, **window) if kernel in PARTLY_MOVED else None

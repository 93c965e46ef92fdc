"""How many bytes XLA itself moves for an op, against the least: where a kernel can win.

    JAX_PLATFORMS=cpu python -m pallas_kernels.traffic --chip=a40
    JAX_PLATFORMS=cpu python -m pallas_kernels.traffic --chip=a40 --chip=h100_pcie
    JAX_PLATFORMS=cpu python -m pallas_kernels.traffic          # a40 and h100

Every op is compiled for the chip with no GPU, as in the audit; the bytes are those that the
compiled program's instructions read and write. A kernel of ours exists where XLA moves at least
1.2 times the least. Exit status 1 where that and the kernels of this folder have come apart.
"""

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm import add_norm_reference
from pallas_kernels.arguments import Parser
from pallas_kernels.chip import find_chip
from pallas_kernels.hlo import Program
from pallas_kernels.offline import compile_for
from pallas_kernels.qk_rope import qk_rope_reference

N, D, F, V = 8_192, 2_048, 5_632, 50_304  # of llama_1400m, at 8,192 tokens a device
T, K = 2_048, 128
HALF = 2  # bytes
WORTHWHILE = 1.2
SPILL = {"xla_gpu_fail_ptx_compilation_on_register_spilling": False}  # XLA's own kernels may


def bytes_moved(hlo: str) -> int:
    """What a compiled program reads and writes."""
    return sum(work.times * work.hbm_bytes for work in Program(hlo).work())


class Op(NamedTuple):
    """An op as plain JAX, at one shape."""

    name: str
    function: Callable
    arguments: tuple
    least: int  # bytes: each input read once, each output written once
    kernel: bool  # whether this folder has one


def _backward(function, arguments, cotangents):
    """Its gradients with respect to all of `arguments`."""
    count = len(arguments)

    def run(*given):
        out = given[count:]
        return jax.vjp(function, *given[:count])[1](out[0] if len(out) == 1 else out)

    return run, (*arguments, *cotangents)


def _half(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _wide(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _swiglu(gate_NF, up_NF):
    return jax.nn.silu(gate_NF) * up_NF


def _rope(x_NHK, cos_NK, sin_NK):
    first, second = jnp.split(x_NHK.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    return (x_NHK * cos_NK[:, None] + turned * sin_NK[:, None]).astype(x_NHK.dtype)


def _adamw(w, m, v, g):
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    return w - 1e-3 * (m / (jnp.sqrt(v) + 1e-8) + 0.1 * w), m, v


def _cross_entropy(logits_NV, targets_N):
    """What is left of the head once its product is made: nats, and logits' gradients."""
    lse_N = jax.nn.logsumexp(logits_NV, axis=1)
    onehot_NV = jax.nn.one_hot(targets_N, V)
    nats = (lse_N - (onehot_NV * logits_NV).sum(1)).sum()
    return nats, (jnp.exp(logits_NV - lse_N[:, None]) - onehot_NV).astype(jnp.bfloat16)


def ops() -> list[Op]:
    stream, heads, ffn = _half(N, D), _half(N, D // 128, 128), _half(N, F)
    tables, leaf, chunk = (_wide(N, 128),) * 2, (_wide(D, F),) * 4, _wide(1_024, V)
    norm = functools.partial(add_norm_reference, bias_D=None, form="rms", eps=1e-6)
    alone = lambda h_ND, gain_D: norm(h_ND, None, gain_D)
    turn = lambda x, cos, sin, dy: jax.vjp(lambda x: _rope(x, cos, sin), x)[1](dy)
    qk = functools.partial(qk_rope_reference, eps=1e-6)
    turned = lambda x, gain, cos, sin, dy: jax.vjp(lambda *x: qk(*x, cos, sin), x, gain)[1](dy)
    x_BTHK = _half(N // T, T, D // K, K)
    qk_given = x_BTHK, _wide(K), _wide(T, K), _wide(T, K)
    gain, targets = _wide(D), jax.ShapeDtypeStruct((1_024,), jnp.int32)
    row, ffn_row = N * D * HALF, N * F * HALF
    return [
        Op("add_norm forward", norm, (stream, stream, gain), 4 * row, True),
        Op("add_norm backward", *_backward(alone, (stream, gain), (stream,) * 2), 4 * row, True),
        Op("cross-entropy", _cross_entropy, (chunk, targets), 6 * 1_024 * V, True),
        Op("swiglu forward", _swiglu, (ffn, ffn), 3 * ffn_row, False),
        Op("swiglu backward", *_backward(_swiglu, (ffn, ffn), (ffn,)), 5 * ffn_row, False),
        Op("rope forward", _rope, (heads, *tables), 2 * row + 8 * N * 128, False),
        Op("rope backward", turn, (heads, *tables, heads), 2 * row + 8 * N * 128, False),
        Op("qk_rope forward", qk, qk_given, 2 * row + 8 * T * K, False),
        Op("qk_rope backward", turned, (*qk_given, x_BTHK), 3 * row + 8 * T * K, True),
        Op("adamw update", _adamw, leaf, 7 * 4 * D * F, False),
    ]


def survey(chip, show=print) -> list[str]:
    """A table of every op on a chip; a sentence for each whose kernel is missing or idle."""
    show(f"{chip.name}: bytes that XLA moves, in MB, by jax {jax.__version__}; no GPU")
    show(f"{'op':18} {'XLA':>8} {'least':>8} {'ratio':>6}  kernel of ours")
    wrong = []
    for op in ops():
        moved = bytes_moved(compile_for(chip, op.function, *op.arguments, **SPILL)[0].as_text())
        ratio = moved / op.least
        show(
            f"{op.name:18} {moved / 1e6:8.1f} {op.least / 1e6:8.1f} {ratio:6.2f}  "
            f"{'yes' if op.kernel else 'none: nothing to win'}"
        )
        if op.kernel != (ratio >= WORTHWHILE):
            want = "has a kernel that can win nothing" if op.kernel else "wants a kernel"
            wrong.append(f"{chip.name}: {op.name} {want}: XLA moves {ratio:.2f} times the least")
    return wrong


def main(argv=None) -> None:
    parser = Parser("python -m pallas_kernels.traffic", __doc__)
    parser.add_argument("--chip", action="append", help="may be repeated; default: a40, h100")
    wrong = []
    try:
        for name in parser.parse_args(argv).chip or ("a40", "h100"):
            wrong += survey(find_chip(name))
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(wrong) if wrong else "kernels stand where XLA leaves bytes to save")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

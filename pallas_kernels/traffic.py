"""Shows, without a GPU, where a fused kernel can be faster: where XLA moves unnecessary bytes.

    JAX_PLATFORMS=cpu python -m pallas_kernels.traffic --chip=a40
    JAX_PLATFORMS=cpu python -m pallas_kernels.traffic --chip=a40 --chip=h100_pcie
    JAX_PLATFORMS=cpu python -m pallas_kernels.traffic          # a40 and h100

XLA compiles each op, written in plain JAX, for the chip. An op's bytes are those that the compiled
instructions read from and write to the GPU's memory; the minimum is to read each input once and to
write each output once. An op limited by memory bandwidth should have a kernel in pallas_kernels if
XLA moves at least 1.2 times the minimum, and none otherwise. GELU is not in the table: its kernel
moves what XLA moves, but in wider loads and with fewer instructions (gelu.py).

The exit status is 1 if an op breaks this rule. The command needs the extra `offline` (pip install
"jaxtrain[offline]"), and measures no times.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm import add_norm_reference
from pallas_kernels.arguments import Parser
from pallas_kernels.chip import Chip
from pallas_kernels.hlo import Program
from pallas_kernels.offline import check_chips, compile_for
from pallas_kernels.qk_rope import qk_rope_reference

N, D, F, V = 8_192, 2_048, 5_632, 50_304  # of llama_1400m, at 8,192 tokens a device
T, K = 2_048, 128
HALF = 2  # bytes of a bfloat16
WORTHWHILE = 1.2
ALLOW_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": False}  # XLA's kernels may


def bytes_moved(hlo: str) -> int:
    """Returns the bytes that a compiled program reads and writes."""
    return sum(work.times * work.hbm_bytes for work in Program(hlo).work())


class MeasuredOp(NamedTuple):
    """An op in plain JAX, at one shape."""

    name: str
    function: Callable
    arguments: tuple
    least_bytes: int  # each input read once, each output written once
    has_kernel: bool  # in this folder


def _backward(function, arguments, cotangents):
    """Returns a function that computes all gradients of another, and its inputs."""
    count = len(arguments)

    def gradients(*inputs):
        out = inputs[count:]
        return jax.vjp(function, *inputs[:count])[1](out[0] if len(out) == 1 else out)

    return gradients, (*arguments, *cotangents)


def _half(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _wide(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _swiglu(gate_NF, up_NF):
    return jax.nn.silu(gate_NF) * up_NF


def _rope(x_NHK, cos_NK, sin_NK):
    first, second = jnp.split(x_NHK.astype(jnp.float32), 2, -1)
    rotated = jnp.concatenate([-second, first], -1)
    return (x_NHK * cos_NK[:, None] + rotated * sin_NK[:, None]).astype(x_NHK.dtype)


def _adamw(w, m, v, g):
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    return w - 1e-3 * (m / (jnp.sqrt(v) + 1e-8) + 0.1 * w), m, v


def _cross_entropy(logits_NV, targets_N):
    """Computes the nats and the logits' gradient: all of the head except its products."""
    lse_N = jax.nn.logsumexp(logits_NV, axis=1)
    onehot_NV = jax.nn.one_hot(targets_N, V)
    nats = (lse_N - (onehot_NV * logits_NV).sum(1)).sum()
    return nats, (jnp.exp(logits_NV - lse_N[:, None]) - onehot_NV).astype(jnp.bfloat16)


def ops() -> list[MeasuredOp]:
    """Returns the ops of llama_1400m that memory bandwidth limits, AdamW's update included."""
    norm = functools.partial(add_norm_reference, bias_D=None, form="rms", eps=1e-6)
    norm_only = lambda h_ND, gain_D: norm(h_ND, None, gain_D)
    rope_backward = lambda x, cos, sin, dy: jax.vjp(lambda x: _rope(x, cos, sin), x)[1](dy)
    qk_rope: Callable = functools.partial(qk_rope_reference, eps=1e-6)

    def qk_backward(x, gain, cos, sin, dy):
        return jax.vjp(lambda x, gain: qk_rope(x, gain, cos, sin), x, gain)[1](dy)

    stream, gain = _half(N, D), _wide(D)
    ffn, chunk, leaf = _half(N, F), _wide(1_024, V), (_wide(D, F),) * 4
    targets = jax.ShapeDtypeStruct((1_024,), jnp.int32)
    x_NHK, x_BTHK = _half(N, D // K, K), _half(N // T, T, D // K, K)
    rope_inputs = x_NHK, _wide(N, K), _wide(N, K)
    qk_inputs = x_BTHK, _wide(K), _wide(T, K), _wide(T, K)
    norm_gradients = _backward(norm_only, (stream, gain), (stream,) * 2)
    swiglu_gradients = _backward(_swiglu, (ffn, ffn), (ffn,))
    row, ffn_row, tables, qk_tables = N * D * HALF, N * F * HALF, 8 * N * K, 8 * T * K
    return [
        MeasuredOp("add_norm forward", norm, (stream, stream, gain), 4 * row, True),
        MeasuredOp("add_norm backward", *norm_gradients, 4 * row, True),
        MeasuredOp("cross-entropy", _cross_entropy, (chunk, targets), 6 * 1_024 * V, True),
        MeasuredOp("swiglu forward", _swiglu, (ffn, ffn), 3 * ffn_row, False),
        MeasuredOp("swiglu backward", *swiglu_gradients, 5 * ffn_row, False),
        MeasuredOp("rope forward", _rope, rope_inputs, 2 * row + tables, False),
        MeasuredOp("rope backward", rope_backward, (*rope_inputs, x_NHK), 2 * row + tables, False),
        MeasuredOp("qk_rope forward", qk_rope, qk_inputs, 2 * row + qk_tables, False),
        MeasuredOp(
            "qk_rope backward", qk_backward, (*qk_inputs, x_BTHK), 3 * row + qk_tables, True
        ),
        MeasuredOp("adamw update", _adamw, leaf, 7 * 4 * D * F, False),
    ]


def survey(chip: Chip, show: Callable[[str], None] = print) -> list[str]:
    """Shows a table of all ops on a chip. Returns a sentence for each op that breaks the rule."""
    show(f"{chip.name}: bytes that XLA moves, in MB, by jax {jax.__version__}; no GPU")
    show(f"{'op':18} {'XLA':>8} {'minimum':>8} {'ratio':>6}  has a kernel")
    faults = []
    for op in ops():
        compiled, _ = compile_for(chip, op.function, *op.arguments, **ALLOW_SPILLS)
        moved = bytes_moved(compiled.as_text() or "")
        ratio = moved / op.least_bytes
        show(
            f"{op.name:18} {moved / 1e6:8.1f} {op.least_bytes / 1e6:8.1f} {ratio:6.2f}  "
            f"{'yes' if op.has_kernel else 'no'}"
        )
        if op.has_kernel != (ratio >= WORTHWHILE):
            fault = "has a kernel that cannot save bytes" if op.has_kernel else "needs a kernel"
            faults.append(
                f"{chip.name}: {op.name} {fault}: XLA moves {ratio:.2f} times the minimum"
            )
    return faults


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m pallas_kernels.traffic", __doc__)
    passed = "there is a kernel wherever XLA moves unnecessary bytes, and nowhere else"
    check_chips(parser, argv, lambda chip, args: survey(chip), passed)


if __name__ == "__main__":
    main()

"""A custom call counts as many FLOPs as the products that it replaces."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # only to lower without cuDNN

from pallas_kernels.audit_cases import CASES
from pallas_kernels.call_flops import (
    KERNELS,
    PALLAS,
    WINDOW_SCOPE,
    custom_call_flops,
    visible_pairs,
)
from pallas_kernels.flash_attention import flash_attention_reference
from pallas_kernels.head_scores import head_scores_reference
from pallas_kernels.hlo import Program
from pallas_kernels.symmetric import symmetric_reference


def test_every_kernel_declares_its_flops():
    assert {case.name for case in CASES} == KERNELS.keys()


B, T, S, H, G, K = 2, 64, 128, 4, 2, 256
Q, KV = (B, T, H, K), (B, S, G, K)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def counted(function, *shapes, dtypes=()):
    """Returns the FLOPs that XLA counts in a function, elementwise operations included."""
    arrays = [array(*shape) for shape in shapes] + [array(*s, dtype=d) for s, d in dtypes]
    return jax.jit(function).lower(*arrays).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("T", "S"), [(6, 6), (4, 7), (7, 4)])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_the_visible_pairs_of_a_window_are_counted_exactly(T, S, window):
    keys, last = np.arange(S), np.arange(T)[:, None] + S - T
    seen = (keys <= last) & (keys > last - (window or S))
    assert visible_pairs(T, S, window) == seen.sum()


def both_ways(q, k, v, do):
    out, pullback = jax.vjp(flash_attention_reference, q, k, v)
    return out, pullback(do)


def test_the_head_counts_what_xla_counts_for_its_reference():
    h, w = (48, 1_024), (640, 1_024)
    reference = counted(head_scores_reference, h, w, dtypes=[((48,), jnp.float32)])
    assert KERNELS["head_scores"](h, w, (48,)) == pytest.approx(reference, rel=0.02)


@pytest.mark.parametrize("adds", [False, True])
def test_a_symmetric_product_counts_one_triangle_of_its_reference(adds):
    x, c = (3, 64, 512), (3, 64, 64)
    multiply = lambda x, c: symmetric_reference(x, x, c if adds else None, (2.0, 0.5))
    triangle = (64 + 1) / (2 * 64)
    name = "symmetric_sum" if adds else "symmetric"
    assert KERNELS[name](x, x, (2,), c) == pytest.approx(
        triangle * counted(multiply, x, c), rel=0.02
    )


def test_attention_counts_the_visible_pairs_of_its_reference():
    visible = (2 * S - T + 1) / (2 * S)
    forward = visible * counted(flash_attention_reference, Q, KV, KV)
    assert KERNELS["flash_attention_forward"](Q, KV, KV) == pytest.approx(forward, rel=0.05)
    flat = [(*shape[:2], shape[2] * shape[3]) for shape in (Q, KV, KV)]  # as Ampere's body gets it
    assert KERNELS["flash_attention_forward"](*flat) == pytest.approx(forward, rel=0.05)
    backward = sum(KERNELS[f"flash_attention_{name}"](Q, KV, KV, Q) for name in ("dkv", "dq"))
    four_products = visible * counted(both_ways, Q, KV, KV, Q) - forward
    # The kernels compute the scores twice and their gradient once more.
    assert backward == pytest.approx(7 / 4 * four_products, rel=0.05)
    dq, stored = (KERNELS[f"flash_attention_dq{end}"] for end in ("", "_stored"))
    ds = (B, H, S, T)
    assert stored(ds, KV) == pytest.approx(dq(Q, KV) / 3)


CALL = 'custom_call_target="{}", metadata={{op_name="jit(step)/{}"}}'


@pytest.mark.parametrize("target", ["__gpu$xla.gpu.triton", "mosaic_gpu_v2"])
@pytest.mark.parametrize(
    "op_name",
    [
        "jvp(head_scores)/pallas_call",
        "jit(head_scores)/head_scores/mpmd_map",
        "jit(symmetric)/while/body/transpose(jvp(head_scores))/pallas_call",
    ],
)
def test_a_kernel_is_found_by_the_last_name_in_its_metadata(target, op_name):
    flops = custom_call_flops(CALL.format(target, op_name), [(4, 8), (16, 8)], [(4, 16)])
    assert flops == 2 * 4 * 8 * 16


@pytest.mark.parametrize("window", [None, 16])
def test_the_window_of_our_attention_is_read_from_its_metadata(window):
    scope = f"transpose(jvp({WINDOW_SCOPE.format(window)}))/" if window else ""
    call = CALL.format(PALLAS[0], f"{scope}flash_attention_forward/pallas_call")
    flops = custom_call_flops(call, [Q, KV, KV], [])
    assert flops == 4 * B * H * K * visible_pairs(T, S, window)


def test_a_kernel_that_declares_no_flops_is_an_error():
    with pytest.raises(ValueError, match="must declare its FLOPs .*new_kernel/pallas_call"):
        custom_call_flops(CALL.format("mosaic_gpu_v2", "new_kernel/pallas_call"), [(4, 8)], [])
    assert custom_call_flops(CALL.format("TopK", "new_kernel/top_k"), [(4, 8)], []) == 0


CUBLAS = """
ENTRY %main (a: bf16[4,256,128]) -> bf16[4,256,256] {
  %a = bf16[4,256,128]{2,1,0} parameter(0)
  %call = (bf16[4,256,256]{2,1,0}, s8[4194304]{0}) custom-call(%a, %a), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %y = bf16[4,256,256]{2,1,0} get-tuple-element(%call), index=0
}
"""


def test_a_cublas_call_counts_its_product_and_no_workspace():
    (work,) = Program(CUBLAS).work()
    assert work.flops == 2 * 4 * 256 * 256 * 128 and work.dtype == "bfloat16"
    assert work.hbm_bytes == 2 * 4 * 256 * (128 + 256)  # a is one array, read once


STORED = """
ENTRY %main (q: {q}, k: {k}, ds: {ds}) -> ({k}, {k}) {{
  %q = {q} parameter(0)
  %k = {k} parameter(1)
  %ds = {ds} parameter(2)
  %dkv = ({k}, {k}{stored}) custom-call(%q, %k, %k, %q), custom_call_target="mosaic_gpu_v2", \
metadata={{op_name="jit(step)/{scope}flash_attention_dkv/pallas_call"}}
  %dq = {q} custom-call(%ds, %k), custom_call_target="mosaic_gpu_v2", \
metadata={{op_name="jit(step)/{scope}flash_attention_dq_stored/pallas_call"}}
  ROOT %y = ({k}, {k}) tuple(%k, %k)
}}
"""


@pytest.mark.parametrize("window", [None, 512])
def test_of_the_stored_gradients_of_scores_only_the_visible_part_moves(window):
    case = next(case for case in CASES if case.name == "flash_attention_dq_stored")
    B, T, H, G, K = case.sizes
    types = {"q": f"bf16[{B},{T},{H},{K}]", "k": f"bf16[{B},{T},{G},{K}]"}
    types["ds"] = f"bf16[{B},{H},{T + 128},{T}]"  # its keys are padded
    types["scope"] = f"{WINDOW_SCOPE.format(window)}/" if window else ""
    dkv, dq = Program(STORED.format(**types, stored=f", {types['ds']}")).work()
    plain_dkv, _ = Program(STORED.format(**types, stored="")).work()
    ds_bytes = 2 * B * H * visible_pairs(T, T, window)
    assert dkv.hbm_bytes - plain_dkv.hbm_bytes == ds_bytes
    assert dq.hbm_bytes == ds_bytes + 2 * B * T * K * (H + G)
    assert window or dq.hbm_bytes == case.hbm_bytes


@pytest.mark.parametrize("window", [None, 16])
def test_cudnns_attention_counts_the_pairs_that_it_computes(window, monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)

    def gradients(q, k, v, do):
        attend = lambda q, k, v: jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            implementation="cudnn",
            local_window_size=window and (window - 1, 0),
        )
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(do)

    arrays = [array(B, T, n, K, dtype=jnp.bfloat16) for n in (H, G, G, H)]
    lowered = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",))
    text = lowered.compiler_ir("hlo").as_hlo_text()
    calls = re.findall(r"custom-call\([^)]*\), (custom_call_target=\"__cudnn\$fmha.*)", text)
    visible = sum(min(t + 1, window or T) for t in range(T))
    flops = [custom_call_flops(call, [(B, T, H, K), (B, T, G, K)], []) for call in calls]
    assert flops == [2 * 2 * B * H * K * visible, 5 * 2 * B * H * K * visible]

"""Compiles the kernels for chips that are not present.

Each compilation has its own process: JAX_PLATFORMS must be set before jax is imported.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import fork_server
import jax
import pytest

pytest.importorskip("cramjam", reason='cramjam is missing: pip install "jaxtrain[offline]"')
pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is missing: offline")
from pallas_kernels import mosaic, search_space  # noqa: E402
from pallas_kernels.audit import find_faults  # noqa: E402
from pallas_kernels.audit_cases import CASES, contest_cases  # noqa: E402
from pallas_kernels.call_flops import ATTENTION_WORK  # noqa: E402
from pallas_kernels.chip import find_chip  # noqa: E402
from pallas_kernels.cubin import Resources, find_cubins  # noqa: E402
from pallas_kernels.offline import KernelReport  # noqa: E402
from pallas_kernels.targets import read_targets  # noqa: E402
from pallas_kernels.tiles import MOSAIC, MOSAIC_HEADS  # noqa: E402


@pytest.fixture(scope="module")
def server():
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)  # would compile at the tests' optimisation level 0
    with fork_server.ForkServer("pallas_kernels.audit", "jaxtrain.training.run", env=env) as server:
        yield server


@pytest.fixture
def run_python(server):
    return server.run


# Each kernel once for each chip, attention with heads of 64 on one and of 128 on the other. The
# command compiles all cases, which takes minutes.
AUDIT = """
from pallas_kernels import audit

def audit_once(chip, audit_cases=audit.audit):
    K = {"a40": 64, "h100": 128}[chip.name]
    cases = [case for case in reversed(audit.CASES) if case.op != "attention" or case.K == K]
    return audit_cases(chip, [*{case.name: case for case in cases}.values()])

audit.audit = audit_once
audit.main()
"""
AUDITED = [*{case.name: case for case in reversed(CASES)}.values()]


@pytest.mark.long
def test_the_audit_of_each_kernel_at_one_size_passes_for_both_chips(run_python, tmp_path):
    done = run_python(AUDIT, f"--json={tmp_path}/audit.json")
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split()[:2] for line in done.stdout.splitlines()]
    names = lambda body: {words_[0] for words_ in words if words_[1:] == [body]}
    assert names("triton") == {case.name for case in AUDITED if not case.tiles}
    hopper = {case.name for case in AUDITED if case.kernel in MOSAIC["sm_90"].get(case.op, ())}
    assert names("mosaic") == (hopper if mosaic.USABLE else set())
    ampere = {case.name for case in AUDITED if case.kernel in MOSAIC["sm_86"].get(case.op, ())}
    assert names("ampere") == (ampere if mosaic.USABLE else set())
    assert mosaic.REASON in done.stdout and "audit passed" in done.stdout
    check_bounds(json.loads((tmp_path / "audit.json").read_text())["kernels"])


def test_the_command_has_every_kernel_for_both_widths_of_heads_and_no_case_twice():
    keys = [(case.name, case.shape, case.only_body, case.hbm_bytes) for case in CASES]
    assert len(set(keys)) == len(keys)
    tiled = {(op, kernel) for op, (_, kernels) in search_space.SPACES.items() for kernel in kernels}
    assert {(case.op, case.kernel) for case in CASES if case.kernel} == tiled
    for kernel in ATTENTION_WORK:
        assert {case.K for case in CASES if case.kernel == kernel} == {*MOSAIC_HEADS}
    for case in CASES:
        sizes = tuple(map(int, re.findall(r"\d+", case.shape)))
        assert sizes[: len(case.sizes)] == case.sizes, case
        assert (f"W={case.window}" in case.shape) == bool(case.window), case
        assert (case.flops > 0) == case.tensor_core and case.hbm_bytes > 0, case


def check_bounds(rows):
    """Checks that exactly the kernels with products have loops, and their bounds are in order."""
    cases = [case for case in AUDITED if mosaic.USABLE or case.only_body != "mosaic"]
    products = {case.name for case in cases if case.op in ("attention", "head", "square")}
    assert {row["kernel"] for row in rows if "loops" in row} == products
    for row in rows:
        if row["kernel"] in products:
            assert row["roofline_s"] <= row["overlapped_s"] <= row["serial_s"], row
            assert all(min(loop["cycles"]["tensor"], 1) for loop in row["loops"])
    if jax.__version__.startswith("0.11."):  # the stored targets are those of its compiler
        compare_targets(
            {(row["chip"], row["kernel"], row["body"], row["shape"]): row for row in rows}
        )


def compare_targets(rows):
    """Compares the stored targets with the audit, where it has all kernels of a contest."""
    compared = Counter()
    for chip, targets in read_targets().items():
        for name, target in targets.items():
            keys = [(chip, c.name, target.body, c.shape) for c in contest_cases(name) or ()]
            if all(key in rows for key in keys):
                compared[chip] += 1
                serial_s = sum(rows[key]["serial_s"] for key in keys)
                advice = f"{chip}, {name}: run python -m pallas_kernels.find_targets"
                assert serial_s == pytest.approx(target.serial_s, rel=0.1), advice
    assert compared["a40"] and compared["h100"]


SHORTLISTED = """
from pallas_kernels.audit import CASES, compile_kernels
from pallas_kernels.chip import find_chip
from pallas_kernels.search_space import SHORTLIST
from pallas_kernels.tiles import FlashAttentionTiles

first = {kernel: tiles[0] for kernel, tiles in SHORTLIST["sm_86"]["attention"].items()}
case = next(case for case in CASES if case.op == "attention")
print(*compile_kernels(case.build_all, find_chip("a40"), FlashAttentionTiles(**first)))
"""


@pytest.mark.long
def test_the_first_tiles_that_the_bench_tries_for_attention_on_an_a40_compile_without_spills(
    run_python,
):
    done = run_python(SHORTLISTED)
    assert done.returncode == 0, done.stderr
    names = [f"flash_attention_{name}" for name in ("dkv", "dq_stored", "forward")]
    assert {*names} <= {*done.stdout.split()}


CHOSEN = """
from pallas_kernels.audit import compile_kernels, find_faults
from pallas_kernels.audit_cases import contest_cases
from pallas_kernels.chip import find_chip
from pallas_kernels.kernel_choice import choose_body
chip = find_chip("h200")
for mask in ("", ", documents"):
    where = "attention", chip.arch, chip.name, "bfloat16", (8, 1_024, 12, 12, 64)
    tiles = choose_body(*where, documents=bool(mask)).tiles
    (case,) = contest_cases(f"attention{mask} forward 8x1024x12:12x64")
    report = compile_kernels(case.build, chip, tiles)[case.name]
    print(find_faults(case, report, chip, "mosaic"))
"""


@pytest.mark.long
@pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON)
def test_the_forward_that_an_h200_runs_does_not_spill_with_and_without_documents(run_python):
    done = run_python(CHOSEN)
    assert done.stdout.split() == ["[]", "[]"], done.stdout + done.stderr


RAGGED = """
import jax, jax.numpy as jnp
from pallas_kernels.chip import find_chip
from pallas_kernels.head_scores import head_scores
from pallas_kernels.offline import compile_for
from pallas_kernels.symmetric import symmetric
from pallas_kernels.tiles import MosaicProductTiles

square, head = MosaicProductTiles(128, 64, 64, 2), MosaicProductTiles(128, 128, 64, 2)
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
compile_for(find_chip("h100"), lambda x: symmetric(x, tiles=square), array(1, 192, 320))
scores = lambda h, w, r: head_scores(h, w, r, head)
operands = array(140, 64), array(288, 64), array(140, dtype=jnp.float32)
print(*compile_for(find_chip("h100"), scores, *operands)[1])
"""


@pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON)
def test_mosaic_bodies_compile_at_every_size_that_they_accept(run_python):
    """The interpreter accepts sizes that Mosaic GPU does not compile."""
    done = run_python(RAGGED)
    assert done.returncode == 0, done.stderr
    assert "head_scores" in done.stdout


SCANNED = """
import jax, jax.numpy as jnp
from jaxtrain.model.layer_scan import scan_layers
from pallas_kernels.chip import find_chip
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.offline import compile_for
from pallas_kernels.tiles import mosaic_tiles

def layer(kind, h, w):
    q = jnp.einsum("BTD,DHK->BTHK", h, w)
    o = flash_attention(q, q, q, None, None, mosaic_tiles("attention", "sm_90"))
    return h + jnp.tanh(jnp.einsum("BTHK,DHK->BTD", o, w)), None

loss = lambda h, w: scan_layers(["only"], layer, h, w, remat="attention")[0].sum()
arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 512, 256), (3, 256, 4, 64))]
program = compile_for(find_chip("h100"), jax.grad(loss, (0, 1)), *arrays)[0].as_text()
calls = [line for line in program.splitlines() if " custom-call(" in line]
print(sum("/flash_attention_forward/" in line for line in calls), len(calls))
"""


@pytest.mark.skipif(not mosaic.USABLE, reason=mosaic.REASON)
def test_a_scan_that_saves_attentions_result_calls_the_kernel_once(run_python):
    """XLA moves a call into the fusion that stores its result, and once kept the call besides."""
    done = run_python(SCANNED)
    assert done.returncode == 0, done.stderr
    forward, calls = map(int, done.stdout.split())
    assert forward == 1 and calls >= 3


CASE = next(case for case in CASES if case.name == "symmetric")
GOOD = KernelReport("symmetric", Resources(200, 0, Counter(HMMA=64)), 128, 136, 32_768)


def broken(**resources):
    return GOOD._replace(resources=GOOD.resources._replace(**resources))


@pytest.mark.parametrize(
    "report, fault",
    [
        (broken(stack_bytes=8), "spills: 8 bytes"),
        (broken(instructions=Counter(HMMA=64, STL=2)), "2 instructions"),
        (GOOD._replace(shared_bytes=101_377), "needs 101377 bytes of shared memory"),
        (broken(instructions=Counter()), "no tensor-core instruction"),
        (broken(registers=255), "1 blocks per multiprocessor; needs 2"),
    ],
)
def test_the_audit_reports_each_fault(report, fault):
    report = report._replace(threads=256) if "blocks per" in fault else report
    assert any(fault in text for text in find_faults(CASE, report, find_chip("a40")))
    assert not find_faults(CASE, GOOD, find_chip("a40"))


@pytest.mark.parametrize(
    "instructions", [{"HGMMA": 8, "LDGSTS": 9}, {"HMMA": 8, "UTMALDG": 9}, {"HGMMA": 8}]
)
def test_a_mosaic_body_must_use_warp_group_products_and_the_memory_accelerator(instructions):
    report, chip = broken(instructions=Counter(instructions)), find_chip("h100")
    assert any("warp-group product" in text for text in find_faults(CASE, report, chip, "mosaic"))
    good = broken(instructions=Counter(HGMMA=8, UTMALDG=3))
    assert not find_faults(CASE, good, chip, "mosaic")


def test_a_body_for_ampere_must_copy_asynchronously_and_has_the_floor_of_tritons():
    chip = find_chip("a40")
    assert find_faults(CASE, GOOD, chip, "ampere") == ["no asynchronous copy"]
    good = broken(instructions=Counter(HMMA=64, LDGSTS=8))
    assert not find_faults(CASE, good, chip, "ampere")
    assert find_faults(CASE, good._replace(threads=256), chip, "ampere")[0].startswith("1 blocks")


SPILLING = """
import jax, jax.numpy as jnp
from pallas_kernels.chip import find_chip
from pallas_kernels.offline import compile_for
from pallas_kernels.symmetric import symmetric
from pallas_kernels.tiles import ProductTiles
x = jax.ShapeDtypeStruct((1, 512, 512), jnp.bfloat16)
one_warp = ProductTiles(128, 128, 16, 1, 1)
compile_for(find_chip("a40"), lambda x: symmetric(x, tiles=one_warp), x)
"""


def test_a_kernel_that_spills_does_not_compile(run_python):
    done = run_python(SPILLING)
    assert done.returncode != 0
    assert "register spilling" in done.stderr


def test_there_is_a_kernel_wherever_xla_moves_unnecessary_bytes_and_nowhere_else(run_python):
    done = run_python("from pallas_kernels import traffic; traffic.main()", "--chip=a40")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" yes\n") == 4 and done.stdout.count(" no\n") == 6


STEP = """
import os
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # code of XLA's own is not checked
import re
import jax
from configs import debug
from jaxtrain.config.train_config import freeze
from jaxtrain.training.run import build_run, compile_step
from pallas_kernels.call_flops import visible_pairs
from pallas_kernels.chip import find_chip
from pallas_kernels.hlo import Program
from pallas_kernels.offline import compiling_for, devices_of
config = debug.get_config()
config.kernels.strict, config.data.document_mask, config.model.window = True, True, 8
config.model.update(L=1, H=2, G=2, K=16, F=32, mlp="gelu")  # all matrices are 32x32
devices = devices_of(find_chip("a40"))
with compiling_for(devices[0]):
    run = build_run(freeze(config), devices)
    text = compile_step(run).compiled.as_text()
names = ("flash_attention_dkv", "flash_attention_dq", "add_norm_backward", "symmetric_sum")
names += ("bias_gelu_forward", "bias_gelu_backward")
assert all(kernel in text for kernel in (*names, "qk_rope_backward"))
print(*(route.implementation for route in run.routes.values()))
counted = {w.instruction.rest: w.flops for w in Program(text).work() if w.flops}
print(*sorted({name for rest in counted for name in re.findall(r"(\\w+)\\)*/pallas_call", rest)}))
print([flops for rest, flops in counted.items() if "flash_attention_dq" in rest])
print([1.5 * 4 * 8 * 2 * 16 * visible_pairs(32, 32, 8)])  # of one layer: B, H, K, T, window
"""


@pytest.mark.long
def test_a_strict_train_step_compiled_for_an_a40_contains_all_fused_kernels(run_python):
    """compile_step raises if a forward kernel is missing; this test also checks the backward's."""
    done = run_python(STEP)
    assert done.returncode == 0, done.stderr
    routes, counted, flops, visible = done.stdout.splitlines()
    assert routes.count("fused:sm_86") == 5 and "flash:sm_86" in routes
    attention = [f"flash_attention_{name}" for name in ("dkv", "dq", "forward")]
    assert counted.split() == [*attention, "head_scores", "symmetric", "symmetric_sum"]
    assert flops == visible


def test_without_jax_platforms_the_error_shows_the_command_that_works():
    argv = [sys.executable, "-m", "pallas_kernels.audit", "--chip=a40"]
    env = os.environ | {"JAX_PLATFORMS": ""}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 1
    assert "JAX_PLATFORMS=cpu" in done.stderr.splitlines()[-1]


def test_bytes_that_are_not_an_executable_contain_no_kernels():
    assert find_cubins(b"nothing in here") == []


def test_without_tokamax_the_audit_says_that_it_compares_nothing(run_python):
    code = "import sys; sys.modules['tokamax'] = None\n"  # as if it was not installed
    code += "from pallas_kernels import audit_peers\nfrom pallas_kernels.chip import find_chip\n"
    done = run_python(f"{code}audit_peers.survey_peers(find_chip('a40'))")
    assert done.stdout == "tokamax is not installed, so its kernels are not compared\n", done.stderr


@pytest.mark.skipif(find_spec("tokamax") is None, reason="tokamax is not installed")
def test_tokamaxs_inner_loops_are_modelled(run_python):
    code = "from pallas_kernels import audit_peers\nfrom pallas_kernels.chip import find_chip\n"
    code += "audit_peers.SIZES = ((1, 512, 4, 2, 128),)\n"
    done = run_python(f"{code}audit_peers.survey_peers(find_chip('h100'))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TFLOP/s overlapped") >= 2, done.stdout

"""Steps compiled for an A40, in one process without the test suite's devices."""

import os
import subprocess
import sys

import pytest
import xla_flags

from jaxtrain.training.memory_formula import ABSOLUTE_ERROR_BYTES, RELATIVE_ERROR

pytest.importorskip("cramjam", reason='cramjam is missing: pip install "jaxtrain[offline]"')
pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is missing: offline")

PROGRAM = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
from types import SimpleNamespace
import jax
import jax.numpy as jnp
from configs import llama_135m
from jaxtrain.config.train_config import freeze
from jaxtrain.planning.compiled import _build_run, compile_plan, with_model
from jaxtrain.planning.hardware import build_hardware
from jaxtrain.training.memory_formula import estimate_memory
from jaxtrain.training.step import build_gradient
from pallas_kernels.chip import find_chip
from pallas_kernels.hlo import Program, bytes_of
from pallas_kernels.offline import compile_for, devices_of

chip = find_chip("a40")
auto = freeze(llama_135m.get_config())
cfg = with_model(auto, remat="attention")  # a scan compiles faster
memory = compile_plan(cfg, build_hardware(chip, 2, 1, "", "ethernet10")).memory
formula = estimate_memory(cfg, 2)
print(memory.peak, formula.peak, memory.parameters + memory.optimizer_state, formula.state)

def loss(h_BTD, w_VD, targets_BT, weights_BT, bias_V):
    nats = (jnp.tanh(h_BTD * w_VD[targets_BT]).sum(-1) * weights_BT).sum()
    return nats, nats

def step(params, tokens_BT1):
    nats, _, grads = gradient(params, {"tokens": tokens_BT1})
    # As the optimizer skips a step whose loss is not finite.
    update = lambda w, g: w - jnp.where(jnp.isfinite(nats), g, 0)
    return nats, jax.tree.map(update, params, grads)

model = SimpleNamespace(apply=lambda params, tokens_BT, docs_BT: params["embed"][tokens_BT])
gradient = build_gradient(model, loss, accumulation=4)
embed, tokens = jax.ShapeDtypeStruct((4_096, 64), "float32"), jax.ShapeDtypeStruct((4, 9), "int32")
for _ in range(2):  # JAX's compile cache has no part in this, see the environment below
    compiled, _ = compile_for(chip, step, {"embed": embed}, tokens)
program = Program(compiled.as_text())
constants = (i for i in program.computations[program.entry] if not i.operands)
ops = ("fusion", "broadcast", "constant")
print(max(bytes_of(i.result) for i in constants if i.op in ops))

devices = devices_of(chip, 2, 1)
with jax.default_device(devices[0]):
    values = dict(window=256, global_every=5, rope_local_theta=1e4, attention_scale=0.1)
    run, notes = _build_run(with_model(cfg, **values), devices)
    print(run.routes["attention"].implementation, *notes)
    print(_build_run(auto, devices)[0].routes["remat"])
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    env = os.environ | {
        "XLA_FLAGS": xla_flags.QUICK_GPU,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    argv = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.long
def test_the_memory_formula_is_within_its_error_bound_of_the_compiled_step(printed):
    peak, peak_by_formula, state, state_by_formula = map(float, printed[0].split())
    assert state == pytest.approx(state_by_formula, rel=0.01)  # vectors are not sharded
    assert abs(peak - peak_by_formula) < max(RELATIVE_ERROR * peak, ABSOLUTE_ERROR_BYTES)


@pytest.mark.long
def test_gradient_accumulation_does_not_allocate_a_second_tree_of_zeros(printed):
    assert int(printed[1]) < 1_024  # the gradient is 1 MiB


@pytest.mark.long
def test_a_model_with_windows_is_compiled_with_the_kernel_and_a_note(printed):
    assert printed[2].startswith("flash:sm_86 attention was compiled as the fused kernel")
    assert printed[2].endswith("compute the same products")


@pytest.mark.long
def test_a_step_compiled_for_a_gpu_chooses_what_to_recompute_by_its_memory(printed):
    assert printed[3].split()[:4] == ["remat", "none", "auto:", "about"]

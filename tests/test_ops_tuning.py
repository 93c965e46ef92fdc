"""The table of settings tuned for each chip."""

import os
import subprocess
import sys

import jax
import pytest

from jaxtrain.ops import tuning
from pallas_kernels.chip import CHIPS


def test_assumed_options_are_printed_and_not_applied():
    for chip, choices in tuning.CHOICES.items():
        assert chip in CHIPS
        assert all(choice.evidence in tuning.EVIDENCE and choice.reason for choice in choices)
        applied = tuning.compiler_options(chip)
        for choice in choices:
            is_assumed = choice.is_option and choice.evidence == "assumed"
            line = next((x for x in tuning.describe_tuning("gpu", chip) if choice.name in x), "")
            assert ("not applied" in line) == is_assumed
            assert not (is_assumed and choice.name in applied)


def test_a_hint_has_a_default_for_unknown_chips():
    assert tuning.hint("a40", "micro_batch_tokens", 7) == 32_768
    assert tuning.hint("no chip", "micro_batch_tokens", 7) == 7
    assert tuning.compiler_options("no chip") == {}


def test_the_start_prints_where_gemm_tunings_are_stored(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert tuning.describe_tuning("gpu", "")[-1].endswith(f"{tmp_path}/{tuning.AUTOTUNED}")
        jax.config.update("jax_compilation_cache_dir", None)
        assert "not stored" in tuning.describe_tuning("gpu", "")[-1]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert tuning.describe_tuning("cpu", "") == []


COMPILE = """
import jax, jax.numpy as jnp
from jaxtrain.ops import tuning
from pallas_kernels.chip import find_chip
from pallas_kernels.offline import compiling_for, devices_of
device = devices_of(find_chip("a40"))[0]
x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
options = {c.name: c.value for c in tuning.choices_for("a40") if c.is_option}
with compiling_for(device):
    jax.jit(lambda x: x @ x).lower(x).compile(compiler_options=options)
"""


def test_the_compiler_accepts_every_option():
    pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is missing: offline")
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", COMPILE]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

"""CUDA plugins without a GPU write nothing to the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.quiet import PLUGINS, has_gpu

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    has_gpu() or not PLUGINS, reason="needs the extra `offline`, no GPU"
)


def run(*argv):
    """A process that has chosen no platform, as a user's."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    argv = [sys.executable, *argv]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def test_a_kernel_tool_says_nothing_of_missing_drivers():
    done = run("-m", "pallas_kernels.bench", "--help")
    assert done.stderr == "" and done.stdout.startswith("Examples:")


def test_jax_is_loaded_quietly_when_it_is_first_used():
    program = (
        "import jaxtrain, sys; assert 'jax' not in sys.modules; import jax; "
        "print(jax.devices()[0].platform, type(jax.__spec__.loader).__name__)"
    )
    done = run("-c", program)
    assert done.stderr == "" and done.stdout == "cpu SourceFileLoader\n"


def test_jax_imported_first_finds_its_devices_quietly():
    """What its own import has written by then cannot be taken back."""
    program = (
        "import sys, jax; sys.stderr.flush(); import os; os.write(2, b'imported\\n'); "
        "import pallas_kernels; print(jax.devices()[0].platform)"
    )
    done = run("-c", program)
    assert done.stderr.endswith("imported\n") and done.stdout == "cpu\n"

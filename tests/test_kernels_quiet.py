"""JAX's CUDA plugins write nothing to the terminal on a machine without a GPU."""

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


def run_python(*argv, **variables):
    """Runs Python as a user does, without JAX_PLATFORMS."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    env |= variables
    argv = [sys.executable, *argv]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def test_a_kernel_tool_prints_nothing_about_missing_drivers():
    done = run_python("-m", "pallas_kernels.bench", "--help")
    assert done.stderr == "" and done.stdout.startswith("Examples:")


def test_jax_is_imported_quietly_and_only_when_it_is_used():
    program = (
        "import jaxtrain, sys; assert 'jax' not in sys.modules; import jax; "
        "print(jax.devices()[0].platform, type(jax.__spec__.loader).__name__)"
    )
    done = run_python("-c", program)
    assert done.stderr == "" and done.stdout == "cpu SourceFileLoader\n"


def test_jax_imported_before_our_packages_finds_its_devices_quietly():
    """What importing jax itself printed came before our packages and is ignored here."""
    program = (
        "import sys, jax; sys.stderr.flush(); import os; os.write(2, b'imported\\n'); "
        "import pallas_kernels; print(jax.devices()[0].platform)"
    )
    done = run_python("-c", program)
    assert done.stderr.endswith("imported\n") and done.stdout == "cpu\n"


@pytest.mark.parametrize("backend", ["jax_plugins/xla_rocm60", "libtpu"])
def test_jax_chooses_where_it_may_have_another_device(backend, tmp_path):
    """To import an optimizer must not move a program from its TPU to the CPU."""
    (tmp_path / backend).mkdir(parents=True)
    (tmp_path / backend / "__init__.py").touch()
    program = "import os, pallas_kernels; print(os.environ.get('JAX_PLATFORMS'))"
    assert run_python("-c", program).stdout == "cpu\n"
    assert run_python("-c", program, PYTHONPATH=str(tmp_path)).stdout == "None\n"

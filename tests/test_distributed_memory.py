import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

import jaxtrain
from configs import debug
from jaxtrain.config.train_config import TrainConfig, freeze
from jaxtrain.distributed import memory
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.planning.hardware import build_hardware
from jaxtrain.planning.search import fits_by_formula
from jaxtrain.training.memory_formula import estimate_memory
from pallas_kernels.chip import find_chip
from pallas_kernels.quiet import has_gpu


@pytest.fixture(autouse=True)
def variables_are_unset(monkeypatch):
    for name in memory.VARIABLES:
        monkeypatch.setenv(name, "")  # also restores what start_runtime sets


@pytest.mark.parametrize(
    ("name", "value", "fraction"),
    [
        ("", "", memory.DEFAULT_FRACTION),
        (memory.VARIABLES[0], "0.5", 0.5),
        (memory.VARIABLES[1], "0.6", 0.6),
    ],
)
def test_plans_use_the_fraction_that_jax_reserves_in_training(name, value, fraction, monkeypatch):
    if name:
        monkeypatch.setenv(name, value)
    start_runtime(TrainConfig(compile_cache=""))
    assert generate_pjrt_gpu_plugin_options()["memory_fraction"] == memory.fraction() == fraction


def test_a_config_that_fits_no_longer_fits_with_a_smaller_fraction(monkeypatch):
    cfg = freeze(debug.get_config())
    hbm_bytes = int(estimate_memory(cfg, 1).peak / 0.8)
    chip = dataclasses.replace(find_chip("a40"), hbm_bytes=hbm_bytes)
    hardware = build_hardware(chip, 1, 1, "", "ethernet10")
    fits = lambda: fits_by_formula(cfg, hardware, cfg.accumulation, cfg.model.remat)
    assert fits()
    monkeypatch.setenv(memory.VARIABLES[0], "0.7")
    assert not fits()


@pytest.mark.parametrize("value", ["0", "1.1", "half"])
def test_an_invalid_fraction_is_refused(value, monkeypatch):
    monkeypatch.setenv(memory.VARIABLES[0], value)
    with pytest.raises(ValueError, match=f"MEM_FRACTION must be in .* got '{value}'"):
        start_runtime(TrainConfig(compile_cache=""))


@pytest.mark.skipif(has_gpu() or sys.platform != "linux", reason="for glibc, without a GPU")
@pytest.mark.parametrize("trainer", [False, True])
def test_freed_memory_is_kept_in_a_trainer_and_not_where_jaxtrain_is_imported(trainer):
    """A user's program gets its memory back, and steps on a CPU need not map theirs again."""
    program = f"""
import numpy
from jaxtrain import keep_freed_memory
if {trainer}:
    keep_freed_memory()
def resident_pages():
    return int(open("/proc/self/statm").read().split()[1])
before = resident_pages()
array = numpy.ones(100 << 20, "uint8")
full = resident_pages()
del array
print((resident_pages() - before) / (full - before))
"""
    root = Path(__file__).parent.parent
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True)
    assert (float(done.stdout) > 0.9) == trainer
    assert (float(done.stdout) < 0.1) != trainer


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("python -m jaxtrain.train --steps=3", True),
        ("python -X dev -m jaxtrain train", True),
        ("python /venv/bin/jaxtrain train", True),
        ("python -um jaxtrain.train", True),
        ("python train.py", False),
        ("python train.py -m jaxtrain.train", False),
        ("python -m pytest -m long", False),
        ("python -m jaxtrainer", False),
        ("python", False),
        ("python -m", False),
    ],
)
def test_our_own_programs_are_distinguished_from_those_that_import_us(line, own, monkeypatch):
    words = line.split()
    first = "" if len(words) == 1 else words[1]
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", ["-m" if first.startswith("-") else first])
    assert jaxtrain._is_own_program() == own

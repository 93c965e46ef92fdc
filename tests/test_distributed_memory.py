import dataclasses

import pytest
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

from configs import debug
from jaxtrain.config.train_config import TrainConfig, freeze
from jaxtrain.distributed import memory
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.planning.hardware import build_hardware
from jaxtrain.planning.memory_formula import estimate_memory
from jaxtrain.planning.search import fits_by_formula
from pallas_kernels.chip import find_chip


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

import dataclasses

import pytest
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

from configs import debug
from jaxtrain.config.train_config import TrainConfig, freeze
from jaxtrain.distributed import memory
from jaxtrain.distributed.runtime import start_runtime
from jaxtrain.planning.memory_formula import estimate_memory
from jaxtrain.planning.search import build_fits_by_formula
from pallas_kernels.chip import find_chip


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in memory.VARIABLES:
        monkeypatch.setenv(name, "")  # restored too where start_runtime sets it


@pytest.mark.parametrize(
    ("name", "value", "share"),
    [
        ("", "", memory.DEFAULT_FRACTION),
        (memory.VARIABLES[0], "0.5", 0.5),
        (memory.VARIABLES[1], "0.6", 0.6),
    ],
)
def test_a_plan_counts_on_the_share_that_jax_takes_in_training(name, value, share, monkeypatch):
    if name:
        monkeypatch.setenv(name, value)
    start_runtime(TrainConfig(compile_cache=""))
    assert generate_pjrt_gpu_plugin_options()["memory_fraction"] == memory.fraction() == share


def test_what_fits_no_longer_fits_where_the_user_leaves_jax_less(monkeypatch):
    cfg = freeze(debug.get_config())
    room = int(estimate_memory(cfg, 1).peak / 0.8)
    chip = dataclasses.replace(find_chip("a40"), hbm_bytes=room)
    fits = lambda: build_fits_by_formula(cfg, chip, 1)(cfg.accumulation, cfg.model.remat)
    assert fits()
    monkeypatch.setenv(memory.VARIABLES[0], "0.7")
    assert not fits()


@pytest.mark.parametrize("value", ["0", "1.1", "half"])
def test_a_share_that_is_none_is_named(value, monkeypatch):
    monkeypatch.setenv(memory.VARIABLES[0], value)
    with pytest.raises(ValueError, match=f"MEM_FRACTION must be in .* got '{value}'"):
        start_runtime(TrainConfig(compile_cache=""))

"""The memory formula against steps that XLA compiled for one GPU, or for several."""

import dataclasses
import importlib

import pytest

from jaxtrain.config.train_config import MeshConfig, TrainConfig, freeze
from jaxtrain.planning.compiled import with_model
from jaxtrain.training.memory_formula import (
    ABSOLUTE_ERROR_BYTES,
    RELATIVE_ERROR,
    estimate_memory,
    is_unrolled,
)

NONE, ATTENTION = "none", "attention"
# (config, micro-batches, devices, remat, the compiled step's bytes on one device), 2026-11-28:
# `jaxtrain plan CONFIG --chip=CHIP --gpus=N --accumulation=N --model.remat=REMAT --json`; with
# "none" all layers are unrolled. For an H200 and jax 0.11.2 unless a comment names others.
COMPILED = [
    ("gpt_124m", 16, 1, NONE, 12_411_285_180),
    ("gpt_350m", 16, 1, NONE, 31_930_835_900),
    ("gpt_774m", 64, 1, NONE, 24_607_086_780),
    ("gpt_774m", 16, 1, NONE, 60_818_487_228),
    ("gpt_1558m", 64, 1, NONE, 43_584_168_660),
    ("llama_135m", 4, 1, NONE, 69_446_586_468),
    ("llama_1400m", 32, 1, NONE, 46_741_079_412),
    ("gpt_1558m", 16, 1, NONE, 104_012_662_484),
    ("gpt_124m", 512, 1, NONE, 2_489_655_996),  # H100
    ("gpt_124m", 16, 1, NONE, 12_668_772_540),  # H100, jax 0.10.2
    ("gpt_124m", 16, 1, NONE, 12_668_777_916),  # A40
    ("gpt_124m", 4, 8, NONE, 6_140_954_260),  # H100
    ("gpt_350m", 4, 8, NONE, 15_227_327_364),  # H100
    ("gpt_350m", 32, 1, NONE, 19_123_363_260),  # A40, jax 0.10.2
    ("llama_135m", 16, 1, NONE, 19_294_114_404),  # H100
    ("llama_1400m", 128, 1, NONE, 27_071_564_660),  # A40
    ("llama_1400m", 32, 1, NONE, 46_693_545_588),  # H100, jax 0.10.2
    ("llama_1400m", 4, 8, NONE, 31_898_251_668),
    ("llama_1400m", 16, 1, ATTENTION, 32_412_775_028),  # A40
    ("gpt_774m", 16, 1, ATTENTION, 20_581_203_644),
    ("gpt_1558m", 64, 1, ATTENTION, 28_039_120_572),
    ("llama_1400m", 32, 1, ATTENTION, 27_429_863_284),
]


def load(name: str, accumulation: int, remat: str) -> TrainConfig:
    config = importlib.import_module(f"configs.{name}").get_config()
    config.accumulation, config.model.remat = accumulation, remat
    return freeze(config)


@pytest.mark.parametrize(("name", "accumulation", "devices", "remat", "compiled"), COMPILED)
def test_the_formula_is_within_its_error_of_compiled_steps(
    name, accumulation, devices, remat, compiled
):
    cfg = load(name, accumulation, remat)
    assert is_unrolled(cfg.model) == (remat == NONE)
    error = abs(estimate_memory(cfg, devices).peak - compiled)
    assert error < max(RELATIVE_ERROR * compiled, ABSOLUTE_ERROR_BYTES)


def test_qk_norm_stores_queries_and_keys_once_more():
    """llama_135m in 16 parts on an H200 takes 20,579,349,660 bytes, without QK-norm 19,102,959,972
    (compiled by jax 0.11.2, 2026-11-28)."""
    cfg = load("llama_135m", 16, NONE)
    more = estimate_memory(with_model(cfg, qk_norm=True), 1).peak - estimate_memory(cfg, 1).peak
    assert more == pytest.approx(20_579_349_660 - 19_102_959_972, rel=0.05)


@pytest.mark.parametrize(
    ("mesh", "compiled"),  # 8 H100s, jax 0.11.2
    [
        (MeshConfig(replica=8, fsdp=1), 7_177_159_356),
        (MeshConfig(tensor=2), 7_385_888_916),
    ],
)
def test_the_formula_is_within_its_error_on_other_meshes(mesh, compiled):
    cfg = dataclasses.replace(load("gpt_124m", 4, NONE), mesh=mesh)
    assert abs(estimate_memory(cfg, 8).peak - compiled) < ABSOLUTE_ERROR_BYTES


def test_two_more_norms_in_each_layer_store_their_inputs():
    cfg = with_model(load("gpt_350m", 16, NONE), norm_place="both")
    compiled = 35_482_116_444  # H200
    assert abs(estimate_memory(cfg, 1).peak - compiled) < RELATIVE_ERROR * compiled


def test_a_scan_stores_more_than_unrolled_layers():
    unrolled = load("gpt_124m", 16, NONE)
    scanned = with_model(unrolled, unroll=1)
    assert estimate_memory(scanned, 1).activations > 1.8 * estimate_memory(unrolled, 1).activations


def test_devices_that_do_not_share_parameters_each_store_all_of_them():
    shared = load("gpt_124m", 16, ATTENTION)
    copies = dataclasses.replace(shared, mesh=MeshConfig(replica=8, fsdp=1))
    whole, eighth = estimate_memory(copies, 8), estimate_memory(shared, 8)
    assert whole.gradients == 8 * eighth.gradients
    assert eighth.state < whole.state < 8 * eighth.state  # replicas split the optimizer's state
    with pytest.raises(ValueError, match="must equal the device count, 4"):
        estimate_memory(copies, 4)


def test_devices_that_split_each_layer_store_less_of_it():
    cfg = load("gpt_124m", 16, NONE)
    split = dataclasses.replace(cfg, mesh=MeshConfig(tensor=2))
    whole, half = estimate_memory(cfg, 1).activations, estimate_memory(split, 2).activations
    assert whole / 2 < half < whole  # the residual stream is not split


def test_auto_must_be_resolved_before_its_memory_is_estimated():
    with pytest.raises(ValueError, match="model.remat must be resolved"):
        estimate_memory(load("gpt_124m", 16, "auto"), 1)

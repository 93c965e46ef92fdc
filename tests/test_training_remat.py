"""model.remat=auto takes the least recomputation that fits the device."""

import dataclasses
import importlib
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.checkpoint.manager import Checkpoints
from jaxtrain.config.train_config import TrainConfig, config_hash, describe_changes, freeze
from jaxtrain.distributed import memory
from jaxtrain.ops.routes import Route, describe_routes
from jaxtrain.planning.compiled import with_model
from jaxtrain.planning.hardware import build_hardware, resolve_remat_for
from jaxtrain.planning.search import stronger_remats
from jaxtrain.train import train
from jaxtrain.training.memory_formula import estimate_memory
from jaxtrain.training.remat import TIGHT, choose_remat, resolve_remat, with_remat
from jaxtrain.training.run import restore_run
from pallas_kernels.chip import find_chip
from tests.runs import debug_config, shared_steps, write_text

SHIPPED = ("gpt_124m", "gpt_350m", "gpt_774m", "gpt_1558m", "llama_135m", "llama_1400m")
GIB = 2**30


@pytest.fixture(autouse=True)
def no_fraction_is_set(monkeypatch):
    for name in memory.VARIABLES:
        monkeypatch.setenv(name, "")


def load(name: str) -> TrainConfig:
    return freeze(importlib.import_module(f"configs.{name}").get_config())


def fake_mesh(devices: int = 1, **device: Any) -> Any:
    """Returns what resolve_remat reads of a mesh of equal devices."""
    device = dict(platform="gpu", device_kind="NVIDIA B9000", memory_stats=lambda: None) | device
    all_devices = np.array([SimpleNamespace(**device)] * devices)
    return SimpleNamespace(devices=all_devices, local_devices=[*all_devices], size=devices)


def bytes_for(cfg: TrainConfig, remat: str) -> int:
    """Returns the least usable bytes with which auto takes `remat`."""
    return int(estimate_memory(with_remat(cfg, remat), 1).peak / TIGHT) + 1


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_auto_takes_the_least_recomputation_that_fits(remat):
    cfg = load("gpt_124m")
    least = bytes_for(cfg, remat)
    assert choose_remat(cfg, 1, least)[0] == with_remat(cfg, remat)
    assert choose_remat(cfg, 1, least - 2)[0] != with_remat(cfg, remat) or remat == "full"


def test_auto_recomputes_everything_where_nothing_fits_and_its_reason_has_the_sizes():
    chosen, reason = choose_remat(load("gpt_124m"), 1, 2 * GIB)
    assert chosen.model.remat == "full"
    assert reason == "auto: about 4 of 2 GiB; 12 with none"


def test_models_too_deep_to_unroll_recompute_as_a_scan_copies_what_it_stores():
    deep = with_model(load("gpt_124m"), L=49)
    chosen, reason = choose_remat(deep, 1, 2**50)
    assert chosen.model.remat == "attention" and "a scan of 49 layers would copy" in reason
    assert choose_remat(with_model(deep, unroll=49), 1, 2**50)[0].model.remat == "none"
    assert choose_remat(with_model(deep, L=12, unroll=2), 1, 2**50)[0].model.remat == "attention"


@pytest.mark.parametrize(
    "section, values",
    [
        ("model", {"dtype": "float32"}),
        ("model", {"attention": "reference"}),
        ("data", {"document_mask": True, "eot": 0}),
    ],
)
def test_attention_that_would_store_its_scores_is_recomputed(section, values):
    cfg = load("gpt_124m")
    fields = dataclasses.replace(getattr(cfg, section), **values)
    cfg = dataclasses.replace(cfg, **{section: fields})
    chosen, reason = choose_remat(cfg, 1, 2**50, "sm_80", "a100_80gb")
    assert chosen.model.remat == "attention" and "would store its scores" in reason


def test_a_cpu_recomputes_nothing_and_a_gpu_of_unknown_memory_does():
    cfg = load("llama_1400m")
    chosen, reason = resolve_remat(cfg, fake_mesh(platform="cpu", device_kind="cpu"))
    assert chosen.model.remat == "none" and reason.startswith("cpu")
    chosen, reason = resolve_remat(cfg, fake_mesh())
    assert chosen.model.remat == "attention" and "memory is unknown" in reason


def test_a_gpu_that_is_not_in_the_chip_table_has_the_memory_of_jaxs_allocator():
    cfg = load("llama_1400m")
    limit = lambda gib: fake_mesh(memory_stats=lambda: {"bytes_limit": gib * GIB})
    assert resolve_remat(cfg, limit(120))[0].model.remat == "none"
    chosen, reason = resolve_remat(cfg, limit(40))
    assert chosen.model.remat == "attention" and "of 40 GiB" in reason


def test_a_value_that_the_user_sets_is_kept():
    cfg = with_remat(load("llama_1400m"), "dots")
    assert resolve_remat(cfg, fake_mesh()) == (cfg, "set by model.remat")


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("chip", ["a40", "h100", "h200"])
def test_a_plan_and_a_run_choose_alike(chip, name, gpus):
    cfg = load(name)
    hardware = build_hardware(find_chip(chip), gpus, 1, "", "ethernet10")
    run = resolve_remat(cfg, fake_mesh(gpus, device_kind=hardware.chip.kind))
    assert resolve_remat_for(cfg, hardware) == run
    assert stronger_remats(run[0])[-1] == "full"


def test_1400m_stores_attentions_results_on_an_a40_and_small_models_everything():
    choices = {}
    for name in SHIPPED:
        for chip in ("a40", "h100", "h200"):
            hardware = build_hardware(find_chip(chip), 1, 1, "", "ethernet10")
            choices[name, chip] = resolve_remat_for(load(name), hardware)[0].model.remat
    assert choices["llama_1400m", "a40"] == "attention"
    assert choices["llama_1400m", "h200"] == choices["gpt_774m", "a40"] == "none"
    assert {choices["gpt_124m", "a40"], choices["gpt_350m", "a40"]} == {"none"}


def test_the_choice_is_printed_among_the_routes():
    route = Route("remat", "none", "auto: about 56 of 118 GiB")
    usual = {"attention": Route("attention", "cudnn", "gpu: flash attention")}
    lines = list(describe_routes(usual | {"remat": route}))
    assert lines[0] == ("route", f"{'remat':<10} {'none':<10} auto: about 56 of 118 GiB")
    plain = dict(describe_routes(usual | {"remat": Route("remat", "none", "set by model.remat")}))
    assert "route" not in plain


def test_a_run_keeps_auto_in_its_records_and_resumes_without_a_change(tmp_path):
    text, folder = write_text(tmp_path), tmp_path / "run"
    values = dict(model__remat="auto", model__L=1, optim__name="adamw", sample__tokens=0)
    with shared_steps():
        for steps in (1, 2):
            cfg = debug_config(folder, text, steps=steps, **values)
            assert train(cfg, jax.devices()[:1], quiet=True) == 0
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"]["model"]["remat"] == "auto"
    assert stored["config_hash"] == config_hash(cfg)
    assert stored["routes"]["remat"].split()[:2] == ["remat", "none"]
    with Checkpoints(folder / "checkpoints", 2, read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == 2 and (meta := checkpoints.read_meta())
        assert not describe_changes(meta["config"], cfg)
    run, state = restore_run(folder)  # as evaluation, sampling and export do
    assert int(state.step) == 2 and run.remat == "none" and run.cfg.model.remat == "auto"

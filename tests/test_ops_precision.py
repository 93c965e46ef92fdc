"""model.dtype=auto becomes the type that suits the device, or the type that the run began with."""

import json
from types import SimpleNamespace

import jax
import pytest

import runs
from configs import debug, quickstart, study
from jaxtrain.config import train_config as config_lib
from jaxtrain.ops import precision
from jaxtrain.ops.precision import choose_dtype, resolve_dtype, resolve_dtype_for_chip
from jaxtrain.run_directory.contents import load_train_config
from jaxtrain.train import train
from pallas_kernels.chip import CHIPS

AMX = frozenset({"amx_bf16", "avx512_bf16"})


@pytest.mark.parametrize(
    ("flags", "dtype", "reason"),
    [
        ({"avx2"}, "float32", "this processor has neither AVX512-BF16 nor AMX-BF16"),
        ({"avx2", "avx512_bf16"}, "bfloat16", "this processor has AVX512-BF16"),
        ({"amx_bf16", "amx_tile"}, "bfloat16", "this processor has AMX-BF16"),
        (AMX, "bfloat16", "this processor has AVX512-BF16 and AMX-BF16"),
        (set(), "float32", "neither"),
    ],
)
def test_a_processor_computes_in_bfloat16_where_it_has_instructions_for_it(
    monkeypatch, flags, dtype, reason
):
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
    chosen, stated_reason = choose_dtype(SimpleNamespace(platform="cpu"))
    assert chosen == dtype and reason in stated_reason


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ("7.0", "float32"),
        ("7.5", "float32"),
        ("8.0", "bfloat16"),
        ("8.6", "bfloat16"),
        ("10.0", "bfloat16"),
        ("gfx90a", "float32"),
        (None, "float32"),
    ],
)
def test_a_gpu_computes_in_bfloat16_from_compute_capability_8_on(capability, dtype):
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
    assert choose_dtype(gpu)[0] == dtype


def test_every_chip_in_the_table_computes_in_bfloat16():
    cfg = config_lib.freeze(quickstart.get_config())
    assert cfg.model.dtype == "auto"
    dtypes = {resolve_dtype_for_chip(cfg, chip).model.dtype for chip in CHIPS.values()}
    assert dtypes == {"bfloat16"}


def test_a_type_that_is_not_auto_is_unchanged(monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", lambda: AMX)
    cfg = config_lib.freeze(debug.get_config())
    assert resolve_dtype(cfg, jax.devices()[0]) == (cfg, "")


def test_the_study_is_the_same_on_every_machine():
    assert study.get_config().base.model.dtype == "float32"


def test_a_resumed_run_continues_in_the_type_that_it_began_with(tmp_path, monkeypatch, capsys):
    def start(steps):
        config = debug.get_config()
        config.update({"workdir": str(tmp_path / "run"), "steps": steps})
        config.data.text, config.sample.tokens = str(text), 0
        config.model.update(dtype="auto", L=1, attention="reference")
        config.optim.name = "adamw"  # compiles fastest
        assert train(config_lib.freeze(config), jax.devices()[:1]) == 0
        return capsys.readouterr().out

    text = runs.write_text(tmp_path)
    monkeypatch.setattr(precision, "cpu_flags", lambda: AMX)
    first_line = "bfloat16 (model.dtype=auto: this processor has AVX512-BF16 and AMX-BF16)"
    assert first_line in start(2)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["config"]["model"]["dtype"] == "bfloat16"
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset())
    out = start(3)
    reason = "the type that the run began with; this processor has neither"
    assert f"bfloat16 (model.dtype=auto: {reason}" in out
    changed = [line.split()[2] for line in out.splitlines() if line.startswith("resumed with")]
    assert changed == ["steps", "optim.total_steps"]
    assert load_train_config(tmp_path / "run").model.dtype == "bfloat16"

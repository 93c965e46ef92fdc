"""The bench measures every shape that a shipped config trains, and the config uses the results."""

import dataclasses
import importlib
import json

import pytest

from jaxtrain.config import train_config as config_lib
from jaxtrain.config.config_files import shipped_configs
from jaxtrain.config.model_section import ModelConfig
from jaxtrain.ops.routes import choose_routes
from pallas_kernels import kernel_choice
from pallas_kernels.chip import CHIPS
from pallas_kernels.contest_sizes import Sizes
from pallas_kernels.contests import build_contests
from pallas_kernels.kernel_choice import OPS, BenchRow, choose_body
from pallas_kernels.tiles import default_tiles, mosaic_tiles

FOR_CPUS = {"debug", "quickstart"}
NAMES = sorted(shipped_configs("train").keys() - FOR_CPUS)
# Kernels that do not compute what a config asks for; the reasons are tested in test_ops_routes.py.
OTHER_MATHEMATICS = {"gpt_track3": {"attention", "head", "qk_rope"}}


def load(name):
    return config_lib.freeze(importlib.import_module(f"configs.{name}").get_config())


def fake_row(op, chip, shape, ratio=0.5, documents=False, tiles=None, date="2026-11-26"):
    tiles = tiles or default_tiles(op, CHIPS[chip].arch)
    version = kernel_choice.jax.__version__
    row = BenchRow(op, chip, "bfloat16", shape, version, tiles, ratio, "xla", 1.0, date, "")
    return row._replace(documents=documents)


def use_rows(monkeypatch, rows):
    monkeypatch.setattr(kernel_choice, "read_rows", lambda folder: rows)


def routes_on(chip, cfg):
    return choose_routes(
        cfg.model,
        cfg.data.document_mask,
        "gpu",
        False,
        cfg.kernels,
        arch=CHIPS[chip].arch,
        chip=chip,
        seq_len=cfg.data.seq_len,
        sequences=cfg.data.batch // cfg.accumulation,
    )


@pytest.mark.parametrize("mosaic", [False, True], ids=["triton", "mosaic"])
@pytest.mark.parametrize("chip", ["a40", "h100"])
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_uses_all_kernels_once_the_bench_is_complete(
    name, chip, mosaic, monkeypatch
):
    arch = CHIPS[chip].arch
    tiles = lambda op: mosaic_tiles(op, arch) if mosaic else default_tiles(op, arch)
    contests = build_contests(Sizes())
    rows = [fake_row(c.op, chip, c.shape, tiles=tiles(c.op)) for c in contests]
    use_rows(monkeypatch, rows)
    monkeypatch.setattr(kernel_choice, "explain_missing_mosaic", lambda: "")
    routes = routes_on(chip, load(name))
    plain = {op for op in OPS if op in routes and not routes[op].is_fused}
    assert plain == OTHER_MATHEMATICS.get(name, set()), routes


@pytest.mark.parametrize("name", NAMES)
def test_the_bench_measures_the_shapes_that_a_shipped_config_trains(name):
    cfg, sizes = load(name), Sizes()
    model = cfg.model
    measured = {(T, H // G, K) for _, T, H, G, K in sizes.attention}
    if "attention" not in OTHER_MATHEMATICS.get(name, ()):
        assert (cfg.data.seq_len, model.H // model.G, model.K) in measured
    assert model.D in {D for _, D in sizes.norm}
    assert (model.D, model.V) in {(D, V) for _, D, V in sizes.head}
    assert (model.D, model.D) in {(M, N) for _, M, N in sizes.square}
    assert model.mlp != "gelu" or model.F in {F for _, F in sizes.gelu}
    assert not model.qk_norm or model.K in {K for *_, K in sizes.qk_rope}


MEASURED = (4, 2_048, 16, 4, 128)  # B, T, H, G, K


@pytest.mark.parametrize(
    ("shape", "same_speed"),
    [
        ((4, 2_048, 16, 4, 128), True),
        ((16, 2_048, 64, 16, 128), True),  # 16 times as many heads, all as far from idle
        ((4, 2_048, 8, 2, 128), True),
        ((4, 2_048, 12, 4, 128), True),  # 3 heads share a key, not 4
        ((4, 2_048, 16, 16, 128), False),
        ((4, 2_048, 16, 4, 64), False),
        ((4, 1_024, 16, 4, 128), False),
        ((1, 2_048, 4, 1, 128), False),  # leaves half of the multiprocessors idle
    ],
)
def test_a_row_of_attention_applies_by_length_width_group_and_enough_work(
    shape, same_speed, monkeypatch
):
    use_rows(monkeypatch, [fake_row("attention", "h100", MEASURED)])
    choice = choose_body("attention", "sm_90", "h100", "bfloat16", shape)
    assert choice.faster == same_speed, choice.reason


def test_a_file_with_rows_of_another_form_is_named(tmp_path):
    row = fake_row("attention", "a40", MEASURED[1:])
    (tmp_path / "a40.json").write_text(json.dumps([row._asdict()]))
    with pytest.raises(ValueError, match="a40.json must contain rows .*op=attention"):
        kernel_choice.read_rows(tmp_path)


def test_the_nearest_row_applies_and_of_equal_ones_the_newest(monkeypatch):
    rows = [fake_row("norm", "a40", (D,), ratio) for D, ratio in ((768, 0.5), (1_024, 0.6))]
    rows += [fake_row("norm", "a40", (768,), 0.7)]
    use_rows(monkeypatch, rows)
    reason = lambda D: choose_body("norm", "sm_86", "a40", "bfloat16", (D,)).reason
    assert "0.60 times" in reason(1_000) and "0.70 times" in reason(800)


@pytest.mark.parametrize(
    ("measured", "wanted", "applies"),
    [
        (512, 512, True),
        (512, 600, True),
        (512, 1_024, False),
        (512, 0, False),
        (0, 512, False),
        (0, 1_800, True),  # nearly all of the 2,048 tokens
        (0, 4_096, True),  # all of them
    ],
)
def test_a_row_of_attention_applies_to_a_similar_window(measured, wanted, applies, monkeypatch):
    use_rows(monkeypatch, [fake_row("attention", "h100", MEASURED)._replace(window=measured)])
    where = "attention", "sm_90", "h100", "bfloat16", MEASURED
    choice = choose_body(*where, window=wanted)
    assert choice.faster == applies
    assert applies or not wanted or f"with a window of {wanted}" in choice.reason


def test_a_model_with_windows_uses_the_kernel_if_it_is_faster_in_all_layers(monkeypatch):
    everywhere = fake_row("attention", "h100", MEASURED)
    within = everywhere._replace(window=512, tiles=mosaic_tiles("attention", "sm_90"))
    monkeypatch.setattr(kernel_choice, "explain_missing_mosaic", lambda: "")
    model = ModelConfig(L=4, D=2_048, H=16, G=4, K=128, window=512)

    def route(rows, **values):
        use_rows(monkeypatch, rows)
        where = dict(arch="sm_90", chip="h100", seq_len=2_048, sequences=4)
        cfg = dataclasses.replace(model, **values)
        return choose_routes(cfg, False, "gpu", False, **where)["attention"]

    assert route([within]).is_fused and not route([everywhere]).is_fused
    assert not route([within], global_every=2).is_fused
    assert route([within], global_every=5).is_fused  # no layer has the number 5
    assert route([within, everywhere], global_every=2).tiles == everywhere.tiles
    assert route([everywhere], global_every=1).is_fused


def test_a_run_with_documents_uses_rows_with_documents(monkeypatch):
    with_documents = fake_row("attention", "a40", MEASURED, 2.0, documents=True)
    choose = lambda documents: choose_body(
        "attention", "sm_86", "a40", "bfloat16", MEASURED, documents=documents
    )
    use_rows(monkeypatch, [with_documents])
    assert not choose(False).faster and "not measured" in choose(False).reason
    assert not choose(True).faster and "2.00 times" in choose(True).reason
    use_rows(monkeypatch, [with_documents, fake_row("attention", "a40", MEASURED, 0.5)])
    assert choose(False).faster and not choose(True).faster
    # cuDNN's attention has no document mask, so what beat it also beats what is left.
    use_rows(monkeypatch, [fake_row("attention", "a40", MEASURED, 0.5)])
    assert choose(True).faster and "measured without documents" in choose(True).reason
    use_rows(monkeypatch, [fake_row("attention", "a40", MEASURED, 1.5)])
    assert not choose(True).faster and "not measured" in choose(True).reason

from types import SimpleNamespace

import pytest

from configs import debug
from jaxtrain.config.data_section import DataConfig
from jaxtrain.config.train_config import freeze
from jaxtrain.planning import search

GIB = 2**30
ROW_GIB = {"none": 9.0, "dots": 4.0, "attention": 1.5, "full": 1.0}
SLOWER = {"none": 1.0, "dots": 1.1, "attention": 1.25, "full": 1.3}
CFG = SimpleNamespace(data=DataConfig(batch=64, seq_len=512))


def build_evaluate(state_gib):
    """Returns evaluate() for a device whose memory and speed are simple functions of a setting."""

    def evaluate(accumulation, remat, fsdp=None):
        activations = ROW_GIB[remat] * 64 / accumulation
        peak = state_gib + activations
        return {
            "remat": remat,
            "accumulation": accumulation,
            "fsdp": fsdp or 8,
            "replica": 1,
            "unroll": 0,
            "seq_len": 512,
            "batch": 64,
            "fits": peak <= 40 and fsdp != 1,  # a full copy of the parameters does not fit
            "mfu_causal": 0.5,
            "tokens_per_s": (5e3 if peak > 36 else 1e4)  # XLA recomputes where memory is tight
            / SLOWER[remat]
            / (1 + 0.01 * accumulation)
            * {None: 1, 4: 1.1, 1: 1.2}[fsdp],
            "memory_bytes": {
                "activations and workspace": activations * GIB,
                "peak": peak * GIB,
                "usable": 40 * GIB,
            },
        }

    return evaluate


@pytest.mark.parametrize("optimism", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("state_gib", [2.0, 30.0, 34.5, 38.2, 39.5])
def test_the_search_finds_the_best_setting_of_an_exhaustive_search(state_gib, optimism):
    shown = []
    evaluate, estimate = build_evaluate(state_gib), build_evaluate(state_gib * optimism)
    fits = lambda *setting: estimate(*setting)["fits"]
    settings = search.search_settings(CFG, 1, evaluate, fits, shown.append)
    every = [evaluate(n, r) for n in search.accumulations(CFG, 1) for r in search.REMATS]
    fitting = [figures for figures in every if figures["fits"]]
    if fitting:
        assert settings[0] == max(fitting, key=lambda figures: figures["tokens_per_s"])
    else:
        assert not settings[0]["fits"]
    assert len(shown) == len(settings) < len(every)


def test_the_fastest_setting_is_tried_on_every_mesh():
    variants = [{"fsdp": size} for size in (8, 4, 1)]
    never = lambda *setting: False  # so that the search starts at the smallest micro-batch
    settings = search.search_settings(
        CFG, 1, build_evaluate(2.0), never, lambda text: None, variants=variants
    )
    assert settings[0]["fsdp"] == 4 and settings[1]["fsdp"] == 8  # 1 is faster but does not fit
    assert [f["fsdp"] for f in settings if not f["fits"]].count(1) == 1
    assert search.settings_table(settings).count("\n") == len(settings)


def test_another_length_keeps_the_tokens_of_a_step():
    cfg = freeze(debug.get_config())
    other = search.with_setting(cfg, 2, "dots", seq_len=64, unroll=2, fsdp=1)
    assert other.data.batch * other.data.seq_len == cfg.data.batch * cfg.data.seq_len
    assert (other.data.seq_len, other.accumulation, other.model.remat) == (64, 2, "dots")
    assert (other.model.unroll, other.mesh.fsdp, other.mesh.replica) == (2, 1, -1)
    with pytest.raises(ValueError, match="got 100. Set --seq_lens"):
        search.with_setting(cfg, 1, "none", seq_len=100)


def test_the_fastest_setting_is_written_as_a_config_file(tmp_path):
    figures = build_evaluate(2.0)(4, "dots") | {"devices": 1, "chip": "a40"}
    search.write_config(tmp_path / "mine.py", "gpt_124m", figures)
    namespace = {}
    exec((tmp_path / "mine.py").read_text(), namespace)
    config = namespace["get_config"]()
    assert config.accumulation == 4 and config.model.remat == "dots" and config.model.D == 768

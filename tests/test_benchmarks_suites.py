"""The suites for the processor, each at a tiny size."""

import importlib.util
import sys
import types

import pytest
import xla_flags

from jaxtrain.benchmarks import cpu_training, data_loading, dispatch, first_step, metrics_overhead
from jaxtrain.benchmarks.timing import warm_up

TINY = dict(L=1, D=16, H=2, G=2, K=8, F=32, V=32, qk_norm=True, attention="reference")
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(cpu_training.SIZES, "s", TINY)
    return dict(peaks={"jax float32": 1e9}, rounds=2, most_s=60, dtypes=["float32"])


def test_rates_and_ratios_of_suite_cpu_follow_from_its_times(tiny):
    variants = ["jaxtrain", "eager"] if HAS_TORCH else ["jaxtrain"]
    rows = cpu_training.measure("s", **tiny, optimizers=["adamw"], variants=variants)
    assert [row["variant"] for row in rows] == variants
    for row in rows:
        assert row["tokens_per_s"] * row["wall_s"] == pytest.approx(8 * 256)
        assert row["of_gemm_peak"] == pytest.approx(row["model_flops_per_s"] / 1e9)
        assert row["first_call_s"] > 0 and row["wall_s"] >= row["wall_min_s"] > 0
    compared = cpu_training.ratios(rows)
    assert [r["ratio"].split()[-1] for r in compared] == (["eager", "fastest"] * HAS_TORCH)
    for row in compared:
        assert row["wall"] == pytest.approx(rows[1]["wall_s"] / rows[0]["wall_s"])
        assert row["case"] in cpu_training.tables(rows)


def test_variants_with_different_first_losses_are_an_error():
    cfg = cpu_training.training_config("s", "float32", "adamw")
    contender = lambda nats: cpu_training.Contender(lambda tokens: nats, cfg)
    contenders = {"a": contender(5.0), "b": contender(5.1)}
    warm_up(contenders, most_s=60)
    with pytest.raises(RuntimeError, match="must compute the same first loss; got .*5.1"):
        cpu_training.check_agreement("s", contenders, "float32")
    cpu_training.check_agreement("s", contenders, "bfloat16")


def test_a_step_is_dispatched_before_it_is_done():
    [row] = dispatch.measure(rounds=5, layers=1)
    assert 0 < row["wall_s"] <= row["whole_step_s"]
    assert 0 < row["cpu_s"]
    assert "1 layers" in dispatch.tables([row])


def test_loader_rates_count_the_tokens_of_all_batches(monkeypatch):
    monkeypatch.setattr(data_loading, "BATCHES", 2)
    rows = data_loading.measure(rounds=2, tokens=200_000)
    *variants, first = rows
    assert [row["variant"] for row in variants] == ["prefetch=2", "prefetch=0", "numpy crops"]
    for row in variants:
        assert row["tokens_per_s"] * row["wall_s"] == pytest.approx(2 * 64 * 1024)
    assert first["first_batch_s"] > first["open_corpus_s"] > 0
    assert "first batch" in data_loading.tables(rows)


SMALL_CONFIG = """
from configs import debug


def get_config():
    config = debug.get_config()
    config.optim.name = "adamw"  # compiles in a quarter of Muon's time
    config.model.update(L=1, D=16, H=2, G=2, K=8, F=32)
    return config
"""


def test_the_cost_of_measuring_is_a_share_of_the_step(monkeypatch):
    module = types.ModuleType("configs.small")
    exec(SMALL_CONFIG, module.__dict__)
    monkeypatch.setitem(sys.modules, "configs.small", module)
    [row] = metrics_overhead.measure(rounds=2, cases=("small",))
    assert 0 < row["cpu_s"] and row["share"] == row["cpu_s"] / row["step_s"]
    assert f"{row['share']:.3%}" in metrics_overhead.tables([row])


@pytest.mark.long
def test_a_start_finishes_its_imports_and_then_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags.flags(devices=1))
    (tmp_path / "small.py").write_text(SMALL_CONFIG)
    times = first_step.time_start(tmp_path / "run", tmp_path / "cache", str(tmp_path / "small.py"))
    assert 0 < times["imports_s"] < times["first_step_s"]
    assert any((tmp_path / "cache").iterdir())


def test_a_failed_start_is_an_error_with_the_childs_output(tmp_path, monkeypatch):
    child = "import sys; sys.exit(f'cannot read {sys.argv[1]}')"
    monkeypatch.setattr(first_step, "CHILD", child)
    message = "absent.py must train a step; it exited 1:\ncannot read --config=absent.py"
    with pytest.raises(RuntimeError, match=message):
        first_step.time_start(tmp_path / "run", tmp_path / "cache", "absent.py")

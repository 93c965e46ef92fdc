import importlib.util
import json
import math
import time

import pytest

from jaxtrain import bench
from jaxtrain.benchmarks import (
    cpu_training,
    data_loading,
    dispatch,
    first_step,
    metrics_overhead,
    processor,
)
from jaxtrain.benchmarks.timing import TimedCall, interleave, summarise, timed, warm_up
from jaxtrain.files import strict_json

TINY = dict(L=1, D=16, H=2, G=2, K=8, F=32, V=32, qk_norm=True, attention="reference")
HAS_TORCH = importlib.util.find_spec("torch") is not None


def test_variants_take_turns_after_two_calls_that_are_not_counted():
    calls = []
    variants = {name: lambda turn, name=name: calls.append((name, turn)) for name in "ABC"}
    first_s = warm_up(variants, most_s=60)
    samples = interleave(variants, rounds=3)
    assert calls[:6] == [(name, turn) for name in "ABC" for turn in (0, 1)]
    assert calls[6:] == [(name, turn) for turn in (2, 3, 4) for name in "ABC"]
    assert first_s.keys() == samples.keys() == set("ABC")
    assert {len(taken) for taken in samples.values()} == {3}


def test_a_slow_variant_sits_later_rounds_out_and_the_others_go_on():
    variants = {"slow": lambda _: time.sleep(0.02), "quick": lambda _: None}
    samples = interleave(variants, rounds=4, most_s=0.01)
    assert {name: len(taken) for name, taken in samples.items()} == {"slow": 1, "quick": 4}


def test_sleep_takes_wall_time_and_work_takes_both():
    asleep = timed(time.sleep, 0.2)

    def work():
        end_s = time.process_time() + 0.2
        while time.process_time() < end_s:
            pass

    awake = timed(work)
    assert asleep.wall_s >= 0.2 and asleep.cpu_s < asleep.wall_s
    assert min(awake.wall_s, awake.cpu_s) >= 0.2
    assert math.isnan(awake.others) or 0 <= awake.others < 1.5


def test_a_summary_is_of_medians_and_the_fastest():
    samples = [TimedCall(wall_s, wall_s / 2, 0.0) for wall_s in (0.03, 0.01, 0.02)]
    summary = summarise(samples)
    assert summary["wall_s"] == 0.02 and summary["wall_min_s"] == 0.01
    assert summary["cpu_s"] == 0.01 and summary["samples"] == 3


def test_the_peak_of_bf16_is_never_below_that_of_float32():
    peaks = {"jax float32": 3.0, "jax bfloat16": 2.0, "torch float32": 4.0, "torch bfloat16": 1.0}
    assert processor.peak_of("float32", peaks) == processor.peak_of("bfloat16", peaks) == 4.0
    assert processor.peak_of("bfloat16", peaks | {"jax bfloat16": 9.0}) == 9.0


def test_the_header_names_the_processor_and_warns_of_load_alone():
    about = processor.describe()
    quiet = processor.header(about | {"load_average": [0.0, 0.0, 0.0]})
    busy = processor.header(about | {"load_average": [9.0 * about["cores"], 0.0, 0.0]})
    assert about["cpu"] in quiet and "bf16 products" in quiet and "WARNING" not in quiet
    assert "WARNING" in busy


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(cpu_training.SIZES, "s", TINY)
    return dict(peaks={"jax float32": 1e9}, rounds=2, most_s=60, dtypes=["float32"])


def test_training_rows_hold_what_their_times_say(tiny):
    variants = ["jaxtrain", "eager"] if HAS_TORCH else ["jaxtrain"]
    rows = cpu_training.run("s", **tiny, optimizers=["adamw"], variants=variants)
    assert [row["variant"] for row in rows] == variants
    for row in rows:
        assert row["tokens_per_s"] * row["wall_s"] == pytest.approx(8 * 256)
        assert row["of_gemm_peak"] == pytest.approx(row["model_flops_per_s"] / 1e9)
        assert row["first_call_s"] > 0 and row["wall_s"] >= row["wall_min_s"] > 0
    compared = cpu_training.ratios(rows)
    assert [r["ratio"].split()[-1] for r in compared] == (["eager", "fastest"] * HAS_TORCH)
    for row in compared:
        assert row["wall"] == pytest.approx(rows[1]["wall_s"] / rows[0]["wall_s"])
        assert row["case"] in cpu_training.show(rows)


def test_variants_that_start_from_other_losses_are_not_compared():
    cfg = cpu_training.config_of("s", "float32", "adamw")
    group = {
        name: cpu_training.Contender(lambda _, x=x: x, cfg) for name, x in (("a", 5), ("b", 5.1))
    }
    warm_up(group, most_s=60)
    with pytest.raises(RuntimeError, match="must compute the same first loss; got .*5.1"):
        cpu_training.check_agreement("s", group, "float32")
    cpu_training.check_agreement("s", group, "bfloat16")


def test_a_call_of_the_step_returns_before_the_step_is_done():
    [row] = dispatch.run(rounds=5, layers=2)
    assert 0 < row["wall_s"] <= row["whole_step_s"]
    assert 0 < row["cpu_s"]
    assert "2 layers" in dispatch.show([row])


def test_loader_rates_count_the_tokens_that_are_delivered(monkeypatch):
    monkeypatch.setattr(data_loading, "BATCHES", 2)
    rows = data_loading.run(rounds=2, tokens=200_000)
    *variants, first = rows
    assert [row["variant"] for row in variants] == ["prefetch=2", "prefetch=0", "numpy crops"]
    for row in variants:
        assert row["tokens_per_s"] * row["wall_s"] == pytest.approx(2 * 64 * 1024)
    assert first["first_batch_s"] > first["open_corpus_s"] > 0
    assert "first batch" in data_loading.show(rows)


def test_the_cost_of_measuring_is_set_against_the_step():
    [row] = metrics_overhead.run(rounds=2, cases=("debug",))
    assert 0 < row["cpu_s"] and row["share"] == row["cpu_s"] / row["step_s"]
    assert f"{row['share']:.3%}" in metrics_overhead.show([row])


def test_a_start_is_its_imports_and_then_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device
    times = first_step.start(tmp_path / "run", tmp_path / "cache", "configs/debug.py")
    assert 0 < times["imports_s"] < times["first_step_s"]
    assert any((tmp_path / "cache").iterdir())


def test_a_start_that_fails_shows_the_childs_error(tmp_path):
    with pytest.raises(RuntimeError, match="absent.py must train a step(.|\n)*absent"):
        first_step.start(tmp_path / "run", tmp_path / "cache", "absent.py")


def test_rows_are_kept_as_lines_of_json(tmp_path, monkeypatch, capsys):
    suite = lambda args, rounds: [([{"suite": "x", "rounds": rounds}], "the table")]
    monkeypatch.setitem(bench.SUITES, "dispatch", suite)
    bench.main(["--suite=dispatch", "--rounds=3", f"--json={tmp_path / 'rows.jsonl'}"])
    about, row = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row == {"suite": "x", "rounds": 3}
    assert about == json.loads(strict_json(about)) and about["versions"]["jax"]
    assert "== dispatch\nthe table" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--suite=tpu", "'cpu'"),
        ("--sizes=s,xl", "--sizes of suite cpu must be of s, m, separated by commas; got xl"),
        ("--suite=optimizer --sizes=xl", "suite optimizer must be of s, m, 124m, separated"),
        ("--suite=cpu --sizes=124m", "suite cpu must be of s, m, separated by commas; got 124m"),
        ("--rounds=0", "must be positive; got 0"),
    ],
)
def test_a_wrong_flag_says_what_is_allowed(flag, said, capsys):
    with pytest.raises(SystemExit):
        bench.parse(flag.split())
    assert said in capsys.readouterr().err


def test_help_teaches_every_suite(capsys):
    with pytest.raises(SystemExit) as status:
        bench.parse(["--help"])
    shown = capsys.readouterr().out
    assert status.value.code == 0
    assert all(f"\n    {name} " in shown for name in bench.SUITES)


@pytest.mark.skipif(HAS_TORCH, reason="torch is here")
def test_without_torch_suite_cpu_says_what_to_install():
    with pytest.raises(SystemExit, match="jaxtrain\\[crosscheck\\]"):
        bench.main(["--suite=cpu", "--sizes=s", "--variants=eager"])

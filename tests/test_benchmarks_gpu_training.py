"""The GPU suites: their planning as laws, and their whole path at tiny sizes on this processor."""

import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtrain import bench
from jaxtrain.benchmarks import gpu_results, gpu_training, loss_parity, scaling
from jaxtrain.benchmarks.child import (
    BenchJob,
    config_of,
    first_gpu,
    pace,
    run_child,
    run_group,
    zipf_tokens,
)
from pallas_kernels.chip import find_chip
from tests.runs import write_text

HAS_TORCH = importlib.util.find_spec("torch") is not None


def test_tokens_have_the_frequencies_of_text_and_are_fresh_every_step():
    tokens = zipf_tokens(1, 64, 1_023, 50_304)
    assert tokens.shape == (64, 1_024) and 0 <= tokens.min() and tokens.max() < 50_304
    counts = np.sort(np.bincount(tokens.ravel(), minlength=50_304))[::-1]
    assert 2 < counts[0] / counts[9] < 5  # (9 + 2.7) / 2.7 = 4.3
    assert not np.array_equal(tokens, zipf_tokens(2, 64, 1_023, 50_304))
    assert np.array_equal(tokens, zipf_tokens(1, 64, 1_023, 50_304))


def test_a_step_is_launched_before_the_one_before_it_is_waited_for():
    seen = []
    launch = lambda batch: seen.append(f"launch {batch}") or batch
    steps_s, hosts_s = pace(launch, lambda batch: seen.append(f"wait {batch}"), range(3))
    assert seen == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "wait 2"]
    assert len(steps_s) == len(hosts_s) == 3


@pytest.mark.parametrize("fits, rows, tried", [(8, 8, []), (2, 2, [8, 4])])
def test_a_micro_batch_that_does_not_fit_is_halved(fits, rows, tried):
    attempt = lambda rows: {"oom": "no room"} if rows > fits else {"tokens_per_s": 1.0}
    assert gpu_training.halve_until_it_fits(attempt, 8) == (
        {"tokens_per_s": 1.0, "out_of_memory_at": tried},
        rows,
    )


def test_what_does_not_fit_at_all_is_an_error_and_no_gap():
    found, rows = gpu_training.halve_until_it_fits(lambda rows: {"oom": "no room"}, 4)
    assert rows == 1 and "out of memory with one row: no room" in found["error"]


def test_a_child_that_crashes_or_lasts_too_long_is_a_row_with_its_last_words(tmp_path):
    broken = run_child("jax_child", BenchJob("train", "gpt_124m"), tmp_path, 60)
    assert "exit status 1" in broken["error"]
    assert "JAX runs on cpu, so its figures would be another device's" in broken["error"]
    assert "more than the 0 s" in run_child("jax_child", BenchJob("about"), tmp_path, 0.1)["error"]


def test_memory_that_the_compiler_wants_in_vain_is_not_tried(tmp_path):
    job = BenchJob("train", "gpt_124m", "adamw", 2, 2, tiny=True, usable_bytes=1_000)
    assert "bytes of 1000" in run_child("jax_child", job, tmp_path, 120)["oom"]


def test_the_first_micro_batch_fits_by_the_formula():
    cfg = config_of(BenchJob("train", "gpt_124m"))
    sizes = [gpu_training.first_rows(cfg, 2**gib * 2**30, 32_768) for gib in (1, 3, 5, 7)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == 32
    assert gpu_training.first_rows(cfg, 0, 4_096) == 4


def test_a_step_is_shortened_to_its_time_on_the_slower_chip():
    peak = lambda chip: find_chip(chip).peak_flops["bfloat16"]
    batch = lambda size, chip: gpu_training.batch_of(config_of(BenchJob("train", size)), peak(chip))
    assert batch("gpt_124m", "a40") < batch("gpt_124m", "h100") <= 512
    assert batch("llama_1400m", "a40") * 2_048 >= gpu_training.LEAST_TOKENS


def test_muon_and_its_twin_come_first_and_every_item_once():
    items = gpu_training.build_items(
        gpu_training.SIZES, gpu_training.OPTIMIZERS, gpu_training.VARIANTS
    )
    assert len(set(items)) == len(items) == 4 * 5 + 1
    assert {item.optimizer for item in items[:8]} == {"muon"}
    assert not any(i.optimizer == "accelerated_lmo" and i.variant == "pytorch" for i in items)


FOUND = {"step_s": 0.5, "optimizer_s": 0.05, "optimizer_range_s": [0.04, 0.06]}
FOUND |= {"host_s": 0.01, "tokens_per_step": 65_536}


def test_the_optimizers_share_falls_with_the_tokens_of_a_step():
    shares = gpu_results.shares(FOUND)
    assert shares["optimizer_share"] == pytest.approx(0.1)
    assert shares["optimizer_share_range"] == pytest.approx([0.08, 0.12])
    assert shares["optimizer_share_at_524288"] == pytest.approx(0.05 / (0.45 * 8 + 0.05))
    assert shares["tokens_per_s_at_524288"] == pytest.approx(524_288 / (0.45 * 8 + 0.05))
    assert shares["host_share"] == pytest.approx(0.02)


@pytest.mark.parametrize("values", [{"optimizer_s": 0.6}, {"optimizer_host_s": 0.045}])
def test_what_cannot_be_the_optimizers_time_in_the_step_is_no_share_but_a_reason(values):
    shares = gpu_results.shares(FOUND | values)
    assert shares["optimizer_share"] is shares["optimizer_share_at_524288"] is None
    assert "took" in shares["no_optimizer_share"]


def test_a_pace_holds_the_devices_work_and_not_the_waits():
    """A device that works 20 ms, of which the host hears 15 ms later: apart it is 35 ms."""
    with ThreadPoolExecutor(1) as device:
        wait = lambda future: (future.result(), time.sleep(0.015))
        steps_s, _ = pace(lambda _: device.submit(time.sleep, 0.02), wait, range(10))
    assert 0.019 < np.median(steps_s[2:]) < 0.03


def test_a_launch_that_sleeps_is_no_work_of_the_host():
    _, hosts_s = pace(lambda _: time.sleep(0.02), lambda _: None, range(3))
    assert max(hosts_s) < 0.01


def test_clocks_are_those_of_the_card_that_a_process_sees_first():
    assert first_gpu({}) == first_gpu({"CUDA_VISIBLE_DEVICES": ""}) == "0"
    assert first_gpu({"CUDA_VISIBLE_DEVICES": "3,1"}) == "3"
    assert first_gpu({"CUDA_VISIBLE_DEVICES": "GPU-6f2a"}) == "GPU-6f2a"


@pytest.mark.parametrize("script, status", [("", 0), ("time.sleep(60)", None)])
def test_what_a_child_has_started_ends_with_it(tmp_path, script, status):
    path = tmp_path / "said"
    start = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True);"
    with open(path, "w") as said:
        assert run_group([sys.executable, "-c", start + script], said, 2.0, None) == status
    pid, until = int(path.read_text()), time.monotonic() + 5
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid) -> bool:
    """Not a zombie either, that nobody has waited for."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not HAS_TORCH, reason='torch is missing: pip install "jaxtrain[crosscheck]"')
def test_torch_without_a_gpu_is_an_error_and_no_slow_row(tmp_path):
    found = run_child("torch_child", BenchJob("train", "gpt_124m", batch=1, rows=1), tmp_path, 60)
    assert "sees no GPU" in found["error"]


def test_mfu_has_the_conventions_of_a_run(tmp_path):
    """6N alone is less by attention's products, of the keys that a query sees."""
    suite = gpu_training.Suite(SimpleNamespace(minutes=1.0), tmp_path)
    suite.chip, cfg = find_chip("h100"), config_of(BenchJob("train", "gpt_124m"))
    found, model, T = suite.mfu(cfg, 4e5, 5e5), cfg.model, cfg.data.seq_len
    attention = 12 * model.L * model.H * model.K * (T + 1) / 2 * 4e5
    gap = attention / suite.chip.peak_flops["bfloat16"]
    assert found["mfu"] - found["mfu_6n"] == pytest.approx(gap)
    assert found["mfu_at_524288"] == pytest.approx(1.25 * found["mfu"])


def test_targets_are_met_or_missed_by_what_was_measured():
    item = gpu_results.Item("gpt_124m", "jaxtrain", "muon")
    row = gpu_results.shares(FOUND) | {"mfu": 0.4, "mfu_at_524288": 0.6, "first_step_s": 70.0}
    found = gpu_results.targets(item, row)
    assert "MISSED" in found["mfu"] and "met" in found["host_share"]
    assert "met" in found["mfu_at_524288"]
    assert "first_step_s" not in found  # asked of the largest size alone
    large = item._replace(size="llama_1400m")
    assert "<= 60 MISSED" in gpu_results.targets(large, row)["first_step_s"]
    assert gpu_results.targets(item._replace(variant="pytorch"), row) == {}


def test_the_ratio_is_of_the_fastest_rows_of_both():
    row = lambda variant, rate, optimizer="muon": {
        "case": f"gpt_124m {optimizer}",
        "variant": variant,
        "what": "step",
        "tokens_per_s": rate,
        "tokens_per_s_at_524288": 2 * rate if variant == "jaxtrain" else None,
    }
    rows = [row("jaxtrain", 90.0), row("jaxtrain", 120.0), row("pytorch", 100.0)]
    pair = gpu_results.ratio_row(rows, "gpt_124m", "muon")
    assert pair["value"] == pytest.approx(1.2) and pair["value_at_524288"] is None
    rows[-1]["tokens_per_s_at_524288"] = 160.0
    pair = gpu_results.ratio_row(rows, "gpt_124m", "muon")
    assert pair["value_at_524288"] == pytest.approx(1.5)
    assert gpu_results.ratio_row(rows[:2], "gpt_124m", "muon") is None
    rows.append(row("jaxtrain", 80.0, "accelerated_lmo"))
    pair = gpu_results.ratio_row(rows, "gpt_124m", "accelerated_lmo")
    assert pair["value"] == pytest.approx(0.8) and "pytorch's muon" in pair["ratio"]


def test_without_a_gpu_the_suites_say_why_they_refuse():
    for suite in ("gpu", "judge"):
        with pytest.raises(SystemExit, match="need a GPU.*--tiny"):
            bench.main([f"--suite={suite}", "--json=/dev/null", "--variants=jaxtrain"])


def test_the_gpu_suite_runs_to_its_end_at_tiny_size(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    variants = "jaxtrain,pytorch" if HAS_TORCH else "jaxtrain"
    argv = ["--suite=gpu", "--tiny", "--sizes=llama_1400m", "--optimizers=adamw"]
    bench.main([*argv, f"--variants={variants}", f"--json={path}"])
    about, ceilings, *rows = map(json.loads, path.read_text().splitlines())
    assert about["commit"] and about["command"] and ceilings["matmul_flops_per_s"] > 0
    assert not [row for row in rows if "error" in row], rows
    assert not any(row["targets"] for row in rows)  # they are a card's
    steps = [row for row in rows if row["what"] != "ratio"]
    assert [row["variant"] for row in steps] == variants.split(",") + ["jaxtrain"]
    for row in steps:
        assert row["tokens_per_s"] * row["step_s"] == pytest.approx(row["tokens_per_step"])
        assert row["step_p95_s"] >= row["step_s"] > 0 < row["optimizer_s"]
        assert row["mfu"] is None and "not in the chip table" in row["no_mfu"]
    assert steps[-1]["what"] == "warm start"
    assert ("ratio" in [row["what"] for row in rows]) == HAS_TORCH
    said = capsys.readouterr().out
    assert "no MFU: 'cpu' is not in the chip table" in said
    assert "tiny: a trial of the path" in said and "target" not in said


def test_losses_apart_by_more_than_the_seeds_are_outside():
    ours = {"0": [2.0] * 10, "1": [2.2] * 10}
    near = loss_parity.compare(ours, {"0": [2.01] * 10, "1": [2.21] * 10})[-1]
    far = loss_parity.compare(ours, {"0": [2.5] * 10, "1": [2.7] * 10})[-1]
    assert near["within_noise"] and near["gap_nats"] == pytest.approx(-0.01)
    assert not far["within_noise"] and "OUTSIDE" in loss_parity.line(far)


@pytest.mark.skipif(not HAS_TORCH, reason='torch is missing: pip install "jaxtrain[crosscheck]"')
def test_the_judge_trains_both_on_the_same_text_to_the_same_losses(tmp_path):
    path = tmp_path / "rows.jsonl"
    bench.main(["--suite=judge", "--tiny", f"--text={write_text(tmp_path)}", f"--json={path}"])
    _, *seeds, verdict = map(json.loads, path.read_text().splitlines())
    assert "error" not in verdict, verdict
    for row in seeds:
        first, second = np.array(row["jaxtrain"]), np.array(row["pytorch"])
        assert first[-1] < first[0]  # it has learned
        np.testing.assert_allclose(first, second, atol=0.05)  # both in bfloat16
    assert verdict["within_noise"] == (abs(verdict["gap_nats"]) <= verdict["seed_noise_nats"])


def test_scaling_runs_on_virtual_devices_and_says_what_that_is_worth(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    bench.main(["--suite=scaling", "--tiny", f"--json={path}"])
    _, *rows = map(json.loads, path.read_text().splitlines())
    assert not [row for row in rows if "error" in row], rows
    assert [row["devices"] for row in rows] == [1, 8] * 4
    for row in rows:
        assert row["efficiency"] == pytest.approx(row["ideal_s"] / row["step_s"])
        assert row["exposed_s"] == pytest.approx(row["step_s"] - row["alone_s"])
        assert row["note"] == scaling.NO_FIGURE
    assert all(row["efficiency"] == 1 for row in rows if row["devices"] == 1)
    assert scaling.NO_FIGURE in capsys.readouterr().out

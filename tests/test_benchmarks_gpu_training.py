"""The suites for GPUs: their plan and figures, and whole runs at tiny sizes on this processor."""

import dataclasses
import importlib.util
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxtrain import bench
from jaxtrain.benchmarks import (
    batch_size,
    gpu_items,
    gpu_results,
    gpu_training,
    jax_child,
    loss_parity,
    scaling,
)
from jaxtrain.benchmarks.child import BenchJob, child_main, job_config, run_child
from jaxtrain.benchmarks.step_timing import first_gpu, time_pipelined, zipf_tokens
from jaxtrain.planning.hardware import build_hardware, resolve_remat_for
from pallas_kernels.chip import find_chip
from tests.runs import write_text

HAS_TORCH = importlib.util.find_spec("torch") is not None


def test_tokens_have_the_frequencies_of_text_and_depend_on_the_seed():
    tokens = zipf_tokens(1, 64, 1_023, 50_304)
    assert tokens.shape == (64, 1_024) and 0 <= tokens.min() and tokens.max() < 50_304
    counts = np.sort(np.bincount(tokens.ravel(), minlength=50_304))[::-1]
    assert 2 < counts[0] / counts[9] < 5  # (9 + 2.7) / 2.7 = 4.3
    assert not np.array_equal(tokens, zipf_tokens(2, 64, 1_023, 50_304))
    assert np.array_equal(tokens, zipf_tokens(1, 64, 1_023, 50_304))


def test_a_step_is_launched_before_the_last_one_is_waited_for():
    seen = []
    launch = lambda batch: seen.append(f"launch {batch}") or batch
    wait = lambda batch: seen.append(f"wait {batch}")
    steps_s, launches_s = time_pipelined(launch, wait, range(3))
    assert seen == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "wait 2"]
    assert len(steps_s) == len(launches_s) == 3


@pytest.mark.parametrize("fits, rows, tried", [(8, 8, []), (2, 2, [8, 4])])
def test_a_micro_batch_that_does_not_fit_is_halved(fits, rows, tried):
    attempt = lambda rows: {"oom": "no room"} if rows > fits else {"tokens_per_s": 1.0}
    result = {"tokens_per_s": 1.0, "out_of_memory_at": tried}
    assert batch_size.halve_until_it_fits(attempt, 8) == (result, rows)


def test_a_step_that_never_fits_is_an_error_row():
    result, rows = batch_size.halve_until_it_fits(lambda rows: {"oom": "no room"}, 4)
    assert rows == 1 and "out of memory with one row: no room" in result["error"]


def test_a_step_that_the_compiler_says_is_too_large_is_not_run():
    job = BenchJob("train", "gpt_124m", "adamw", 2, 2, tiny=True, usable_bytes=1_000)
    assert "bytes of 1000" in next(jax_child.train(job))["oom"]


def test_the_first_micro_batch_fits_by_the_formula():
    cfg = job_config(BenchJob("train", "gpt_124m"))
    sizes = [batch_size.first_rows(cfg, 2**gib * 2**30, 32_768) for gib in (1, 3, 5, 7)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == 32
    assert batch_size.first_rows(cfg, 0, 4_096) == 4


def test_micro_batches_that_recompute_nothing_are_preferred_unless_they_are_small():
    cfg = job_config(BenchJob("train", "gpt_774m"))
    rows = lambda gib: batch_size.first_rows(cfg, gib * 2**30, 32_768)
    remat = lambda gib: batch_size.with_rows(cfg, rows(gib), gib * 2**30).model.remat
    assert (rows(80), remat(80)) == (32, "none")
    assert (rows(40), remat(40)) == (8, "none")
    assert (rows(28), remat(28)) == (32, "attention")  # with 4 rows, none would fit
    assert batch_size.with_rows(cfg, 4, 28 * 2**30).model.remat == "none"


@pytest.mark.parametrize("size", gpu_items.SIZES)
@pytest.mark.parametrize("chip", ["a40", "h100", "h200"])
def test_the_suite_expects_the_remat_that_its_child_chooses(chip, size):
    hardware = build_hardware(find_chip(chip), 1, 1, "", "ethernet10")
    cfg = job_config(BenchJob("train", size))
    for rows in (32, 8):
        ours = batch_size.with_rows(cfg, rows, hardware.usable_bytes)
        child = job_config(BenchJob("train", size, batch=cfg.data.batch, rows=rows))
        assert resolve_remat_for(child, hardware)[0].model == ours.model


def test_slower_chips_get_fewer_sequences_per_step():
    def batch(size, chip):
        cfg = job_config(BenchJob("train", size))
        return batch_size.fitting_batch(cfg, find_chip(chip).peak_flops["bfloat16"])

    assert batch("gpt_124m", "a40") < batch("gpt_124m", "h100") <= 512
    assert batch("llama_1400m", "a40") * 2_048 >= batch_size.LEAST_TOKENS


RESULT = {"step_s": 0.5, "optimizer_s": 0.05, "optimizer_range_s": [0.04, 0.06]}
RESULT |= {"host_s": 0.01, "tokens_per_step": 65_536}


def test_the_optimizers_share_falls_with_the_tokens_of_a_step():
    shares = gpu_results.step_shares(RESULT)
    assert shares["optimizer_share"] == pytest.approx(0.1)
    assert shares["optimizer_share_range"] == pytest.approx([0.08, 0.12])
    assert shares["optimizer_share_at_524288"] == pytest.approx(0.05 / (0.45 * 8 + 0.05))
    assert shares["tokens_per_s_at_524288"] == pytest.approx(524_288 / (0.45 * 8 + 0.05))
    assert shares["host_share"] == pytest.approx(0.02)


def test_a_step_whose_child_ended_before_the_optimizer_was_timed_has_its_other_figures():
    step = {key: RESULT[key] for key in ("step_s", "host_s", "tokens_per_step")}
    shares = gpu_results.step_shares(step | {"incomplete": "killed: it took too long"})
    assert shares["optimizer_share"] is None and shares["host_share"] == pytest.approx(0.02)
    assert shares["no_optimizer_share"] == "killed: it took too long"


@pytest.mark.parametrize("values", [{"optimizer_s": 0.6}, {"optimizer_host_s": 0.045}])
def test_a_time_that_cannot_be_the_optimizers_in_the_step_gives_no_share_but_a_reason(values):
    shares = gpu_results.step_shares(RESULT | values)
    assert shares["optimizer_share"] is shares["optimizer_share_at_524288"] is None
    assert "took" in shares["no_optimizer_share"]


def test_a_pipelined_step_time_has_the_devices_work_but_not_the_latency_of_waiting():
    """The device works for 20 ms and each wait returns 15 ms late: 35 ms if not pipelined."""
    with ThreadPoolExecutor(1) as device:
        wait = lambda future: (future.result(), time.sleep(0.015))
        steps_s, _ = time_pipelined(lambda _: device.submit(time.sleep, 0.02), wait, range(10))
    # A busy machine makes steps longer, but no step below 35 ms without a pipeline.
    assert sum(steps_s) >= 0.2 and min(steps_s) < 0.03


def test_a_launch_that_sleeps_does_not_count_as_host_work():
    _, launches_s = time_pipelined(lambda _: time.sleep(0.02), lambda _: None, range(3))
    assert max(launches_s) < 0.01


def test_clocks_are_read_from_the_gpu_that_the_process_sees_first():
    assert first_gpu({}) == first_gpu({"CUDA_VISIBLE_DEVICES": ""}) == "0"
    assert first_gpu({"CUDA_VISIBLE_DEVICES": "3,1"}) == "3"
    assert first_gpu({"CUDA_VISIBLE_DEVICES": "GPU-6f2a"}) == "GPU-6f2a"


@pytest.mark.skipif(not HAS_TORCH, reason='torch is missing: pip install "jaxtrain[crosscheck]"')
def test_torch_without_a_gpu_is_an_error():
    from jaxtrain.benchmarks import torch_child

    with pytest.raises(RuntimeError, match="sees no GPU"):
        torch_child.train(BenchJob("train", "gpt_124m"))


def test_more_rows_than_a_step_has_are_an_error_row(tmp_path, monkeypatch):
    flags = dict(minutes=1.0, rows=4, tiny=True, seconds=1.0, trace="")
    suite = gpu_training.GpuSuite(SimpleNamespace(**flags), tmp_path)
    monkeypatch.setattr(suite, "_run_child", lambda variant, job: pytest.fail("it started"))
    suite._device = {"device": "cpu", "matmul_flops_per_s": 1e12}
    row = suite.measure(gpu_items.Item("gpt_124m", "jaxtrain", "muon"))
    assert row and row["error"] == "--rows must be at most 2, the sequences of a step; got 4"


def test_mfu_with_causal_attention_and_by_6n_differ_by_the_attention(tmp_path):
    suite = gpu_training.GpuSuite(SimpleNamespace(minutes=1.0), tmp_path)
    suite.chip, cfg = find_chip("h100"), job_config(BenchJob("train", "gpt_124m"))
    mfu, model, T = suite.mfu(cfg, 4e5, 5e5), cfg.model, cfg.data.seq_len
    attention = 12 * model.L * model.H * model.K * (T + 1) / 2 * 4e5
    difference = attention / suite.chip.peak_flops["bfloat16"]
    assert mfu["mfu"] - mfu["mfu_6n"] == pytest.approx(difference)
    assert mfu["mfu_at_524288"] == pytest.approx(1.25 * mfu["mfu"])


def test_targets_are_met_or_missed():
    item = gpu_items.Item("gpt_124m", "jaxtrain", "muon")
    row = gpu_results.step_shares(RESULT) | {"mfu": 0.4, "mfu_at_524288": 0.6, "first_step_s": 70.0}
    assert "idle_share" not in gpu_results.target_verdicts(item, row)  # there was no profile
    row["idle_share"] = 0.018
    verdicts = gpu_results.target_verdicts(item, row)
    assert "MISSED" in verdicts["mfu"] and "met" in verdicts["idle_share"]
    assert "met" in verdicts["mfu_at_524288"]
    assert "first_step_s" not in verdicts  # only the largest size has this target
    large = item._replace(size="llama_1400m")
    assert "<= 60 MISSED" in gpu_results.target_verdicts(large, row)["first_step_s"]
    assert gpu_results.target_verdicts(item._replace(variant="pytorch"), row) == {}


def test_the_ratio_compares_the_fastest_rows_of_both():
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


def test_without_a_gpu_the_suites_end_with_an_error():
    for suite in ("gpu", "judge"):
        with pytest.raises(SystemExit, match="need a GPU.*--tiny"):
            bench.main([f"--suite={suite}", "--json=/dev/null", "--variants=jaxtrain"])


def run_in_process(module, job, folder, limit_s, env):
    """Does a job in this process, which saves the imports of a child.

    Two jobs have a child: JAX's that uses a compile cache, and PyTorch's that times a step.
    """
    if job.cache or (module, job.kind) == ("torch_child", "train"):
        return run_child(module, job, folder, limit_s, env)
    paths, child = (folder / "job.json", folder / "result.json"), jax_child
    paths[0].write_text(json.dumps(dataclasses.asdict(job)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", *map(str, paths)])
        if module == "torch_child":
            import torch

            from jaxtrain.benchmarks import torch_child as child

            # It would stay set in this process.
            patch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
        child_main(child.KINDS | {"scale": scaling.measure_scaling}, child.is_oom)
    return json.loads(paths[1].read_text())


@pytest.mark.long
def test_the_gpu_suite_runs_to_its_end_at_tiny_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_training, "run_child", run_in_process)
    path = tmp_path / "rows.jsonl"
    variants = "jaxtrain,pytorch" if HAS_TORCH else "jaxtrain"
    argv = ["--suite=gpu", "--tiny", "--sizes=llama_1400m", "--optimizers=adamw"]
    bench.main([*argv, f"--variants={variants}", f"--json={path}"])
    about, ceilings, *rows = map(json.loads, path.read_text().splitlines())
    assert about["commit"] and about["command"] and ceilings["matmul_flops_per_s"] > 0
    assert not [row for row in rows if "error" in row], rows
    assert not any(row["targets"] for row in rows)  # they are meant for GPUs
    steps = [row for row in rows if row["what"] != "ratio"]
    assert [row["variant"] for row in steps] == variants.split(",") + ["jaxtrain"]
    for row in steps:
        assert row["tokens_per_s"] * row["step_s"] == pytest.approx(row["tokens_per_step"])
        assert row["step_p95_s"] >= row["step_s"] > 0 < row["optimizer_s"]
        assert len(row["steps_s"]) == row["samples"] and row["step_s"] == pytest.approx(
            np.median(row["steps_s"])
        )
        assert row["mfu"] is None and "not in the chip table" in row["no_mfu"]
    assert steps[-1]["what"] == "warm start"
    assert ("ratio" in [row["what"] for row in rows]) == HAS_TORCH
    text = capsys.readouterr().out
    check_all_is_a_trial([about, ceilings, *rows], text)
    assert all(row["value"] is None for row in rows if row["what"] == "ratio")
    assert "no MFU: 'cpu' is not in the chip table" in text
    assert "tiny: no meaningful figures" in text and "target" not in text


def check_all_is_a_trial(rows, text):
    assert all(row["tiny"] is True for row in rows)
    assert all(line.startswith("trial: ") for line in text.splitlines())
    assert not re.search(r"\d\.\d\dx", text)  # a ratio, such as 2.94x


def test_losses_that_differ_by_more_than_the_spread_over_seeds_fail():
    ours = {"0": [2.0] * 10, "1": [2.2] * 10}
    near = loss_parity.compare_losses(ours, {"0": [2.01] * 10, "1": [2.21] * 10})[-1]
    far = loss_parity.compare_losses(ours, {"0": [2.5] * 10, "1": [2.7] * 10})[-1]
    assert near["within_noise"] and near["gap_nats"] == pytest.approx(-0.01)
    assert not far["within_noise"] and "OUTSIDE" in loss_parity.describe(far)


@pytest.mark.long
@pytest.mark.skipif(not HAS_TORCH, reason='torch is missing: pip install "jaxtrain[crosscheck]"')
def test_suite_judge_trains_both_frameworks_to_the_same_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_parity, "run_child", run_in_process)
    path = tmp_path / "rows.jsonl"
    bench.main(["--suite=judge", "--tiny", f"--text={write_text(tmp_path)}", f"--json={path}"])
    about, *seeds, verdict = map(json.loads, path.read_text().splitlines())
    check_all_is_a_trial([about, *seeds, verdict], capsys.readouterr().out)
    assert "error" not in verdict, verdict
    for row in seeds:
        first, second = np.array(row["jaxtrain"]), np.array(row["pytorch"])
        assert first[-1] < first[0]  # it learned
        np.testing.assert_allclose(first, second, atol=0.05)  # both in bfloat16
    assert verdict["within_noise"] == (abs(verdict["gap_nats"]) <= verdict["seed_noise_nats"])


def test_suite_scaling_derives_its_figures_from_the_times_of_steps(tmp_path, monkeypatch, capsys):
    """A step of n devices takes 3 ms for each of a device's rows and 1 ms for communication."""
    asked = []

    def step_s(job, mesh, batch, devices):
        asked.append((mesh, batch, len(devices)))
        return 3e-3 * batch / len(devices) + 1e-3 * (len(devices) > 1)

    def run_child(module, job, folder, limit_s, env):
        assert env["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=8")
        return run_in_process(module, job, folder, limit_s, env)

    monkeypatch.setattr(scaling, "median_step_s", step_s)
    monkeypatch.setattr(scaling, "run_child", run_child)
    path = tmp_path / "rows.jsonl"
    bench.main(["--suite=scaling", "--tiny", f"--json={path}"])
    about, *rows = map(json.loads, path.read_text().splitlines())
    assert [row["devices"] for row in rows] == [1, 8] * 4
    assert len(asked) == len(set(asked)) == 4  # no program is timed twice
    for row in rows:
        assert row["exposed_s"] == pytest.approx(1e-3 if row["devices"] > 1 else 0.0)
        assert row["efficiency"] == pytest.approx(0.75 if row["devices"] > 1 else 1.0)
        assert row["note"] == scaling.NO_FIGURE
    text = capsys.readouterr().out
    check_all_is_a_trial([about, *rows], text)
    assert scaling.NO_FIGURE in text


@pytest.mark.long
def test_suite_scaling_times_a_step_on_two_devices():
    mesh = scaling.MESHES["fsdp"](2)
    assert scaling.median_step_s(scaling.TINY_JOB, mesh, 2, jax.devices()[:2]) > 0

"""Whole runs agree within tolerances that are wide enough for rounding and not for a fault."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason='torch is missing: pip install "jaxtrain[crosscheck]" to test the PyTorch side'
)

from jaxtrain.axes import Axes  # noqa: E402
from jaxtrain.crosscheck.comparison import compare_traces  # noqa: E402
from jaxtrain.crosscheck.explanation import explain  # noqa: E402
from jaxtrain.crosscheck.rounding import entry_errors  # noqa: E402
from tests.crosscheck_sides import (  # noqa: E402, F401
    median_share_of_formula,
    one_layer,
    one_thread_and_old_x64_setting,
    record_jax,
    record_torch,
    small_config,
)

TEXT = "".join(f"line {i}: {i * i} is the square of {i}.\n" for i in range(2_000))


def test_an_entry_whose_error_is_small_by_luck_gets_that_of_its_row_and_column():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=(64, 1)) + rng.normal(size=(1, 32)))
    error = sizes * rng.normal(size=sizes.shape)
    error[3, 5] = 0.0
    found = entry_errors(error, Axes.parse("V|D"))
    assert np.all(found >= np.abs(error))
    assert 0.3 < found[3, 5] / sizes[3, 5] < 3
    vector = entry_errors(error[3], Axes.parse("|D"))
    assert vector[5] == pytest.approx(np.sqrt(np.mean(error[3] ** 2)))
    assert np.all(entry_errors(np.zeros((2, 3)), Axes.parse("V|D")) == 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def muon_config(folder, text, steps):
    """Returns the config of a layer whose programs are the same for any number of steps."""
    options = {"name": "muon", "weight_decay": 0.1, "total_steps": 40}
    return one_layer(small_config("llama", folder, text, "float32", steps, **options))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, text):
    """Returns (Start, trace of the jaxtrain side) of a small Llama."""
    folder = tmp_path_factory.mktemp("rounding")
    options = {"keep_batches": True, "measure_rounding": True}
    return record_jax(muon_config(folder, text, 3), folder / "ours.jsonl", **options)


def check_float32(ours, theirs):
    """Compares two float32 runs and checks the differences of their first step."""
    found = compare_traces(ours, theirs)
    assert found.divergence is None, explain(found)
    assert largest(found, "gradient", [1]) < 1e-5
    assert largest(found, "loss", [1]) < 1e-6
    return found


def largest(comparison, quantity, steps):
    found = (d for step in steps for d in comparison.differences[step])
    return max(d.size for d in found if d.quantity == quantity)


@pytest.mark.long
def test_the_tolerances_are_a_few_times_what_rounding_causes(recorded, tmp_path):
    start, ours = recorded
    found = compare_traces(ours, record_torch(start, tmp_path / "t.jsonl", batches=ours))
    assert found.measured
    assert found.divergence is None, explain(found)
    assert median_share_of_formula(found) < 1  # stricter, too
    differences = [d for step in found.steps for d in found.differences[step] if d.tolerance]
    assert np.median([d.size / d.tolerance for d in differences]) > 0.02


@pytest.mark.long
def test_a_fault_above_rounding_is_found_in_float32_and_one_below_it_is_not(recorded, tmp_path):
    start, ours = recorded
    cfg = start.run.cfg
    for change, stage in ((1e-4, "optimizer"), (1e-7, None)):
        rate = cfg.optim.learning_rate * (1 + change)
        faulty = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, learning_rate=rate))
        theirs = record_torch(start, tmp_path / "t.jsonl", faulty, batches=ours)
        found = compare_traces(ours, theirs)
        assert (found.divergence and found.divergence.stage) == stage, explain(found)
    assert "below rounding, and so not seen, are differences up to: loss" in explain(found)


@pytest.mark.long
def test_40_steps_of_muon_stay_within_the_formulas_tolerances(recorded, text, tmp_path):
    assert recorded  # has compiled the step
    start, ours = record_jax(muon_config(tmp_path, text, 40), tmp_path / "ours.jsonl")
    found = check_float32(ours, record_torch(start, tmp_path / "theirs.jsonl"))
    assert not found.measured
    assert largest(found, "parameter", range(1, 21)) < 1e-4
    assert np.abs(found.losses[:, 0] - found.losses[:, 1]).max() < 1e-3
    assert found.losses[-1].mean() < found.losses[0].mean() - 1  # it learned


@pytest.mark.long
def test_20_steps_of_adamw_agree_and_rounding_decides_only_the_bias_of_the_keys(tmp_path, text):
    cfg = small_config("gpt2", tmp_path, text, "float32", 20, name="adamw", weight_decay=0.1)
    start, ours = record_jax(one_layer(cfg), tmp_path / "ours.jsonl", measure_rounding=True)
    theirs = record_torch(start, tmp_path / "theirs.jsonl")
    found = check_float32(ours, theirs)
    assert found.rounding_only == {"blocks.0.attention.k.bias"}
    assert largest(found, "parameter", range(1, 21)) < 1e-5
    without = [{k: x for k, x in line.items() if k != "tolerance"} for line in ours.steps]
    check_float32(ours._replace(steps=without), theirs)  # by the formula, too


def test_without_measured_rounding_the_report_says_that_the_tolerances_are_a_formula(
    recorded, tmp_path
):
    start, ours = recorded
    theirs = record_torch(start, tmp_path / "t.jsonl", batches=ours)
    found = compare_traces(theirs, theirs)
    assert not found.measured
    assert "neither trace measured its rounding" in explain(found)


@pytest.mark.long
def test_newton_schulz_in_bfloat16_agrees_within_its_own_rounding(tmp_path, text):
    options = {"ns_dtype": "bfloat16", "ns_form": "torch"}
    cfg = small_config("llama", tmp_path, text, "float32", 3, **options)
    start, ours = record_jax(one_layer(cfg), tmp_path / "o.jsonl", measure_rounding=True)
    theirs = record_torch(start, tmp_path / "t.jsonl")  # torch.optim.Muon's arithmetic, bit by bit
    found = compare_traces(ours, theirs)
    assert found.divergence is None, explain(found)
    matrices = [d for d in found.differences[1] if d.quantity == "update" and "mlp" in d.tensor]
    limits = [d.tolerance for d in matrices]
    assert 1e-2 < np.median(limits) < 0.5, limits  # as large as the rounding of bfloat16

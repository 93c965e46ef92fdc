"""Compares a small run whose batch grows, with interruptions, with a plain loop over its steps."""

import dataclasses

import jax
import numpy as np
import pytest

import runs
from jaxtrain.branching.branch import plan_branch
from jaxtrain.config.train_config import flatten
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.metrics.jsonl import read_metrics
from jaxtrain.optim.build import peak_rates
from jaxtrain.run_directory.contents import load_train_config
from jaxtrain.train import train
from jaxtrain.training.programs import compile_programs
from jaxtrain.training.run import build_run, restore_run
from jaxtrain.training.step import place_rates

STEPS, T = 6, 16
VALUES = {"steps": STEPS, "optim__total_steps": STEPS, "model__L": 1, "data__seq_len": T}
VALUES |= {"model__D": 16, "model__F": 32, "model__attention": "reference"}
VALUES |= {"optim__name": "adamw"}
VALUES |= {"data__batch": 8, "accumulation": 2, "sample__tokens": 0, "eval_tokens": 128}
VALUES |= {"log_every": 1, "save_every": 9, "keep_every": 1, "data__batch_schedule": "0:4 192:8"}
FIRST_LARGE = 4  # three steps of 4 sequences


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with runs.shared_steps():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that is interrupted before its batch grows, and after."""
    folder = tmp_path_factory.mktemp("runs")
    text = runs.write_text(folder)
    for steps in (2, 5, STEPS):  # each resumes the one before
        cfg = runs.debug_config(folder / "run", text, **VALUES | {"steps": steps})
        assert train(cfg, jax.devices()[:1], quiet=True) == 0
    return folder / "run"


def test_an_interrupted_run_is_bitwise_a_loop_that_cuts_the_sequences_itself(trained):
    cfg = load_train_config(trained)
    rule = {"batch_schedule": "", "batch": 4}
    plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **rule), accumulation=1)
    run = build_run(plain, jax.devices()[:1])
    corpus = open_corpus(plain.data, "train", plain.model.V, trained)
    programs = compile_programs(build_run(cfg, jax.devices()[:1]), 0, None, lambda line: None)
    (state, _), losses = initial_state(run), []
    with build_batches(plain.data, corpus, run.mesh, plain.seed) as batches:
        for step in range(1, STEPS + 1):
            parts = 1 if step < FIRST_LARGE else 2
            rows = np.concatenate([np.asarray(next(batches)["tokens"]) for _ in range(parts)])
            factor = 0.5**0.5 if parts == 1 else 1.0
            peaks = peak_rates(cfg.optim, run.model.axes).items()
            rates = place_rates({name: factor * rate for name, rate in peaks}, run.mesh)
            batch = {"tokens": jax.device_put(rows, batch_sharding(run.mesh))}
            state, scalars = programs.at(step).step(state, batch, rates)
            losses.append((step, float(scalars["train/loss_nats"])))
    assert runs.losses(trained) == losses
    equal = jax.tree.map(np.array_equal, restore_run(trained)[1].params, state.params)
    assert all(jax.tree.leaves(equal))
    small, large = programs.at(1), programs.at(FIRST_LARGE)
    assert programs.at(FIRST_LARGE - 1) is small and programs.is_last_of_size(FIRST_LARGE - 1)
    assert 2 * small.work.flops_causal == large.work.flops_causal
    assert programs.growth(3, 6) == 2 and programs.growth(5, 6) == programs.growth(6, 6) == 1


def test_the_metrics_count_tokens_by_the_size_of_each_step(trained):
    records = [r for r in read_metrics(trained / "metrics.jsonl") if "train/tokens" in r]
    assert [r["train/sequences"] for r in records] == [4] * 3 + [8] * 3
    assert [r["train/tokens"] // T for r in records] == [4, 8, 12, 20, 28, 36]
    assert {r["optim/batch_factor"] for r in records} == {0.5**0.5, 1.0}
    steps = [r for r in read_metrics(trained / "hosts" / "0.jsonl") if "event" not in r]
    assert [r["step"] for r in steps if r.get("first")] == [1, 3, FIRST_LARGE, 6]
    for record, step in zip(records, steps, strict=True):
        tokens = record["train/sequences"] * T
        assert record["perf/tokens_per_s"] == pytest.approx(tokens / step["perf/step_time_s"])


def test_a_branch_with_a_new_optimizer_counts_the_schedule_from_its_own_start(trained, tmp_path):
    values = load_train_config(trained)
    optim = dataclasses.replace(values.optim, name="muon")
    branch = plan_branch(trained, 2, tmp_path / "muon", dataclasses.replace(values, optim=optim))
    assert branch.lineage["new_optimizer"]
    assert branch.cfg.data.batch_schedule == "0:4 64:8"
    same = plan_branch(trained, 2, tmp_path / "same", values)
    assert flatten(same.cfg) | {"workdir": ""} == flatten(values) | {"workdir": ""}

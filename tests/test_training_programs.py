"""A small run whose batch grows, against a loop of its own, and interrupted before and after."""

import dataclasses

import jax
import numpy as np
import pytest

import runs
from jaxtrain.branching.branch import plan_branch
from jaxtrain.checkpoint.integrity import read_record
from jaxtrain.config.train_config import flatten
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.distributed.mesh import batch_sharding
from jaxtrain.interop.initial_state import initial_state
from jaxtrain.metrics.jsonl import read_metrics
from jaxtrain.run_directory.contents import load_train_config
from jaxtrain.train import train
from jaxtrain.training.programs import compile_programs
from jaxtrain.training.run import build_run

STEPS, T = 6, 16
VALUES = {"steps": STEPS, "optim__total_steps": STEPS, "model__L": 1, "data__seq_len": T}
VALUES |= {"data__batch": 8, "accumulation": 2, "sample__tokens": 0, "eval_tokens": 128}
VALUES |= {"log_every": 1, "save_every": 3, "keep_every": 1, "data__batch_schedule": "0:4 192:8"}
FIRST_LARGE = 4  # three steps of 4 sequences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def text(folder):
    return runs.write_text(folder)


@pytest.fixture(scope="module")
def whole(folder, text):
    cfg = runs.debug_config(folder / "whole", text, **VALUES)
    assert train(cfg, jax.devices()[:1], quiet=True) == 0
    return folder / "whole"


def test_the_losses_are_those_of_a_loop_that_cuts_the_sequences_itself(whole):
    cfg = load_train_config(whole)
    rule = {"batch_schedule": "", "batch": 4}
    plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **rule), accumulation=1)
    run = build_run(plain, jax.devices()[:1])
    corpus = open_corpus(plain.data, "train", plain.model.V, whole)
    programs = compile_programs(build_run(cfg, jax.devices()[:1]), 0, None, lambda line: None)
    (state, _), losses = initial_state(run), []
    with build_batches(plain.data, corpus, run.mesh, plain.seed) as batches:
        for step in range(1, STEPS + 1):
            parts = 1 if step < FIRST_LARGE else 2
            rows = np.concatenate([np.asarray(next(batches)["tokens"]) for _ in range(parts)])
            factor = np.float32(0.5**0.5 if parts == 1 else 1)
            rates = {name: rate * factor for name, rate in run.rates().items()}
            batch = {"tokens": jax.device_put(rows, batch_sharding(run.mesh))}
            state, scalars = programs.at(step).step(state, batch, rates)
            losses.append(float(scalars["train/loss_nats"]))
    assert runs.losses(whole) == losses
    small, large = programs.at(1), programs.at(FIRST_LARGE)
    assert programs.at(FIRST_LARGE - 1) is small and programs.is_last_of_size(FIRST_LARGE - 1)
    assert 2 * small.work.flops_causal == large.work.flops_causal
    assert programs.growth(3, 6) == 2 and programs.growth(5, 6) == programs.growth(6, 6) == 1


def test_the_metrics_count_tokens_by_the_size_of_each_step(whole):
    records = [r for r in read_metrics(whole / "metrics.jsonl") if "train/tokens" in r]
    assert [r["train/sequences"] for r in records] == [4] * 3 + [8] * 3
    assert [r["train/tokens"] // T for r in records] == [4, 8, 12, 20, 28, 36]
    assert {r["optim/batch_factor"] for r in records} == {0.5**0.5, 1.0}
    steps = [r for r in read_metrics(whole / "hosts" / "0.jsonl") if "event" not in r]
    assert [r["step"] for r in steps if r.get("first")] == [1, FIRST_LARGE]
    for record, step in zip(records, steps, strict=True):
        tokens = record["train/sequences"] * T
        assert record["perf/tokens_per_s"] == pytest.approx(tokens / step["perf/step_time_s"])


def test_a_run_interrupted_before_and_after_the_batch_grows_is_bitwise_the_same(
    whole, folder, text
):
    for steps in (2, 5, STEPS):  # each resumes the one before
        values = VALUES | {"steps": steps, "save_every": 9}
        cfg = runs.debug_config(folder / "parts", text, **values)
        assert train(cfg, jax.devices()[:1], quiet=True) == 0
    assert runs.losses(folder / "parts") == runs.losses(whole)
    records = [read_record(folder / n / "checkpoints" / str(STEPS)) for n in ("whole", "parts")]
    assert records[0]["leaves"] == records[1]["leaves"]  # the digest of every array
    assert records[0]["meta"]["data"] == records[1]["meta"]["data"]


def test_a_branch_with_a_new_optimizer_counts_the_schedule_from_its_own_start(whole, folder):
    values = load_train_config(whole)
    optim = dataclasses.replace(values.optim, name="adamw")
    branch = plan_branch(whole, 3, folder / "adamw", dataclasses.replace(values, optim=optim))
    assert branch.lineage["new_optimizer"]
    assert branch.cfg.data.batch_schedule == "0:8"
    same = plan_branch(whole, 3, folder / "same", values)
    assert flatten(same.cfg) | {"workdir": ""} == flatten(values) | {"workdir": ""}

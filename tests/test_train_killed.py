"""Runs that were killed, preempted or interrupted log what an uninterrupted run logs."""

import json
import os
import signal
import time

import jax
import pytest

import runs
from jaxtrain.data.loader import EvalBatches
from jaxtrain.errors import INTERRUPTED, PREEMPTED
from jaxtrain.train import train
from jaxtrain.training import evaluation as evaluation_module

COMPILES_FASTEST = dict(optim__name="adamw", model__L=1, model__attention="reference")


@pytest.mark.long
def test_a_run_killed_and_then_preempted_has_the_losses_of_an_uninterrupted_run(tmp_path):
    text = runs.write_text(tmp_path)
    values = dict(steps=160, save_every=40, sample__tokens=0)
    values |= COMPILES_FASTEST
    device = jax.devices()[:1]
    train(runs.debug_config(tmp_path / "whole", text, **values), device, quiet=True)
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]
    broken = tmp_path / "broken"
    process = runs.fork(broken, text, *flags)
    runs.signal_at(process, broken, 47, signal.SIGKILL)
    runs.finish(process, -signal.SIGKILL)
    process = runs.fork(broken, text, *flags)
    runs.signal_at(process, broken, 75, signal.SIGTERM)
    out = runs.finish(process, PREEMPTED)
    assert "resume" in out and "the same command resumes it" in out
    assert f"-m jaxtrain.train --config=configs/debug.py --config.workdir={broken}" in out
    assert 75 <= runs.losses(broken)[-1][0] < 160
    assert train(runs.debug_config(broken, text, **values), device, quiet=True) == 0
    assert runs.losses(broken) == runs.losses(tmp_path / "whole")


def config(folder, name):
    values = dict(steps=8, eval_every=4, eval_tokens=0, save_every=100, sample__tokens=0)
    values |= COMPILES_FASTEST
    return runs.debug_config(folder / name, folder / "text.txt", **values)


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with runs.shared_steps():
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a text and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("shared")
    runs.write_text(folder)
    train(config(folder, "whole"), jax.devices()[:1], quiet=True)
    return folder


def logged(workdir):
    """Returns (step, loss, held-out loss) of every logged line that has one."""
    records = runs.read_metrics(workdir / "metrics.jsonl")
    rows = [(r["step"], r.get("train/loss_nats"), r.get("eval/loss_nats")) for r in records]
    return [row for row in rows if row[1:] != (None, None)]


def test_a_signal_interrupts_an_evaluation_and_the_resumed_run_repeats_it(shared, monkeypatch):
    """Interrupts the evaluation of step 4, within the run, and then that of step 8, at its end."""
    device, evaluations, batches_after = jax.devices()[:1], [], []
    signals = {1: signal.SIGTERM, 3: signal.SIGINT}  # the second one repeats the first

    class BatchesWithASignal(EvalBatches):
        def __iter__(self):
            evaluations.append(len(evaluations) + 1)
            number = signals.get(evaluations[-1])
            for i, batch in enumerate(super().__iter__()):
                if number and i == 2:
                    signal.raise_signal(number)
                    time.sleep(0.1)
                elif number and i > 2:
                    batches_after.append(i)
                yield batch

    cfg, workdir = config(shared, "broken"), shared / "broken"
    monkeypatch.setattr(evaluation_module, "build_eval_batches", BatchesWithASignal)
    for step, name, status in ((4, "SIGTERM", PREEMPTED), (8, "SIGINT", INTERRUPTED)):
        batches_after.clear()
        assert train(cfg, device, quiet=True) == status
        assert len(batches_after) <= 1
        last_step, _, eval_loss = logged(workdir)[-1]
        assert last_step == step and eval_loss is None
        assert (workdir / "checkpoints" / str(step)).exists()
        assert json.loads((workdir / "summary.json").read_text())["stopped_by"] == name
    assert train(cfg, device, quiet=True) == 0
    assert evaluations == [1, 2, 3, 4] and logged(workdir) == logged(shared / "whole")


@pytest.mark.long
def test_a_signal_to_one_of_two_processes_interrupts_the_evaluation_of_both(tmp_path, monkeypatch):
    text = runs.write_text(tmp_path)
    text.write_text(text.read_text() * 100)
    flags = ["--config.eval_tokens=0", "--config.steps=1000", "--config.eval_every=3"]
    flags += ["--config.sample.tokens=0"]
    flags += [f"--config.{name.replace('__', '.')}={x}" for name, x in COMPILES_FASTEST.items()]
    pair = []
    for i, own in enumerate(runs.flags_of_processes(2)):
        monkeypatch.setenv("JAXTRAIN_BEAT", str(tmp_path / f"beats{i}"))
        pair.append(runs.fork(tmp_path / "pair", text, *flags, *own))
    while runs.phase_of(tmp_path / "beats0") != "eval":
        assert all(process.poll() is None for process in pair), pair[0].communicate()[0]
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(pair[1].pid, signal.SIGTERM)
    started_s = time.monotonic()
    outs = [runs.finish(process, PREEMPTED) for process in pair]
    assert time.monotonic() - started_s < 60
    assert "the evaluation of step 3 was interrupted" in outs[0]
    last_step, _, eval_loss = logged(tmp_path / "pair")[-1]
    assert last_step == 3 and eval_loss is None

"""Runs that are killed, preempted and stopped log what one that was not does."""

import json
import os
import signal
import socket
import time

import jax
import pytest
import runs

from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.data.loader import build_eval_batches
from jaxtrain.errors import INTERRUPTED, PREEMPTED
from jaxtrain.train import train
from jaxtrain.training import loop as loop_module


def test_runs_killed_and_preempted_equal_one_that_was_not(tmp_path):
    text = runs.write_text(tmp_path)
    cache = f"--config.compile_cache={tmp_path / 'cache'}"
    flags = ("--config.steps=200", "--config.save_every=20", "--config.sample.tokens=0", cache)
    runs.finish(runs.start(tmp_path / "whole", text, *flags))
    broken = tmp_path / "broken"
    process = runs.start(broken, text, *flags)
    runs.signal_at(process, broken, 47, signal.SIGKILL)
    runs.finish(process, -signal.SIGKILL)
    process = runs.start(broken, text, *flags)
    runs.signal_at(process, broken, 90, signal.SIGTERM)
    out = runs.finish(process, PREEMPTED)
    assert "resume" in out and "the same command resumes it" in out
    assert f"-m jaxtrain.train --config=configs/debug.py --config.workdir={broken}" in out
    assert 90 <= runs.losses(broken)[-1][0] < 200
    process = runs.start(broken, text, *flags)
    runs.signal_at(process, broken, 140, signal.SIGINT)
    runs.finish(process, INTERRUPTED)
    runs.finish(runs.start(broken, text, *flags))
    assert runs.losses(broken) == runs.losses(tmp_path / "whole")


VALUES = {"steps": 8, "eval_every": 4, "eval_tokens": 0, "save_every": 100}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a text and a run that nothing stopped, and the programs of both."""
    folder = tmp_path_factory.mktemp("shared")
    runs.write_text(folder)
    train(config(folder / "whole", folder, **VALUES), jax.devices()[:1], quiet=True)
    return folder


def config(workdir, shared, **values):
    config = debug.get_config()
    config.update({"workdir": str(workdir), "compile_cache": str(shared / "cache")})
    config.data.text, config.sample.tokens = str(shared / "text.txt"), 0
    config.update(values)
    return config_lib.freeze(config)


def logged(workdir):
    """(step, loss, held-out loss) of every logged line that has one."""
    records = runs.read_metrics(workdir / "metrics.jsonl")
    rows = [(r["step"], r.get("train/loss_nats"), r.get("eval/loss_nats")) for r in records]
    return [row for row in rows if row[1:] != (None, None)]


@pytest.mark.parametrize(("evaluation", "step"), [(1, 4), (2, 8)], ids=["within", "at the end"])
def test_a_signal_in_an_evaluation_ends_it_and_the_resumed_run_makes_it(
    tmp_path, shared, monkeypatch, evaluation, step
):
    device, begun, after = jax.devices()[:1], [], []

    def with_a_signal(*args):
        begun.append(len(begun) + 1)
        for number, batch in enumerate(build_eval_batches(*args)):
            if begun[-1] == evaluation and number == 2:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0.1)
            elif begun[-1] == evaluation and number > 2:
                after.append(number)
            yield batch

    broken = config(tmp_path / "broken", shared, **VALUES)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "build_eval_batches", with_a_signal)
        assert train(broken, device, quiet=True) == PREEMPTED
    assert len(after) <= 1
    assert [row[0] for row in logged(tmp_path / "broken")][-1] == step
    assert logged(tmp_path / "broken")[-1][2] is None
    assert (tmp_path / "broken" / "checkpoints" / str(step)).exists()
    assert json.loads((tmp_path / "broken" / "summary.json").read_text())["stopped_by"] == "SIGTERM"
    assert train(broken, device, quiet=True) == 0
    assert logged(tmp_path / "broken") == logged(shared / "whole")


def test_a_signal_to_one_of_two_processes_ends_the_evaluation_of_both(tmp_path, monkeypatch):
    text = runs.write_text(tmp_path)
    text.write_text(text.read_text() * 100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2", "--config.eval_tokens=0"]
    flags += ["--config.steps=1000", "--config.eval_every=3", "--config.sample.tokens=0"]
    pair = []
    for i in range(2):
        monkeypatch.setenv("JAXTRAIN_BEAT", str(tmp_path / f"beats{i}"))
        pair.append(runs.start(tmp_path / "pair", text, *flags, f"--process={i}"))
    while runs.phase_of(tmp_path / "beats0") != "eval":
        assert all(process.poll() is None for process in pair), pair[0].communicate()[0]
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(pair[1].pid, signal.SIGTERM)
    started_s = time.monotonic()
    outs = [runs.finish(process, PREEMPTED) for process in pair]
    assert time.monotonic() - started_s < 10
    assert "the evaluation of step 3 was interrupted" in outs[0]
    assert logged(tmp_path / "pair")[-1][0] == 3 and logged(tmp_path / "pair")[-1][2] is None

"""docs/minimal.py computes what the trainer computes."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import debug
from jaxtrain.config import train_config as config_lib
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.loader import build_batches
from jaxtrain.training.run import build_run, compile_step
from jaxtrain.training.step import init_state

FILE = Path(__file__).parent.parent / "docs" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trainer_losses(cfg, steps):
    """Returns (batches, losses) of the first steps of a TrainConfig."""
    run = build_run(cfg, jax.devices()[:1])
    corpus = open_corpus(cfg.data, "train", cfg.model.V, cfg.workdir)
    compiled = compile_step(run)
    state = init_state(run.model, run.optimizer, run.mesh, cfg.seed)
    tokens, losses = [], []
    with build_batches(cfg.data, corpus, run.mesh, cfg.seed) as batches:
        for _ in range(steps):
            batch = next(batches)
            tokens.append(np.asarray(batch["tokens"]))
            state, scalars = compiled(state, batch, run.rates())
            losses.append(float(scalars["train/loss_nats"]))
    return tokens, losses


@pytest.mark.long
@pytest.mark.parametrize(("ns_dtype", "ulps"), [("float32", 32), ("bfloat16", 400)])
def test_losses_of_20_debug_steps_equal_the_trainers(minimal, tmp_path, ns_dtype, ulps):
    text = tmp_path / "text"
    text.write_bytes(FILE.read_bytes() + Path(importlib.util.__file__).read_bytes())
    config = debug.get_config()
    config.workdir, config.data.text = str(tmp_path / "run"), str(text)
    config.optim.ns_dtype = ns_dtype
    tokens, losses = trainer_losses(config_lib.freeze(config), minimal.STEPS)
    np.testing.assert_array_max_ulp(np.float32(minimal.train(tokens)), np.float32(losses), ulps)


def test_the_file_stays_short_and_imports_nothing_of_the_project():
    source = FILE.read_text()
    assert len(source.splitlines()) < 200
    assert not any(f"import {name}" in source for name in ("jaxtrain", "configs", "pallas_kernels"))

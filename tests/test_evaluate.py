import dataclasses

import jax
import numpy as np
import pytest

from configs import debug
from jaxtrain.config import freeze
from jaxtrain.evaluate import build_eval_step, evaluate, fit_parts, rows_in_training
from jaxtrain.run import build_run
from jaxtrain.step import TrainState

BATCH = 32


def run_in(parts):
    config = debug.get_config()
    config.update(accumulation=parts)
    config.data.batch = BATCH
    config.model.L = 1
    return build_run(freeze(config), jax.devices()[:2])


def batch():
    """Ragged rows of documents, the last of them padding alone."""
    rng = np.random.default_rng(0)
    lengths = np.append(rng.integers(2, 34, BATCH - 5), [0] * 5)
    docs = np.where(np.arange(33) < lengths[:, None], 0, -1)
    tokens = rng.integers(0, 256, (BATCH, 33))
    return {"tokens": tokens.astype(np.int32), "docs": docs.astype(np.int32)}


def test_evaluation_in_microbatches_is_that_of_whole_batches_in_their_memory():
    results, temporary_bytes = [], []
    for parts in (1, 8):
        run = run_in(parts)
        params = jax.jit(run.model.init)(jax.random.key(0))
        state = TrainState(0, params, (), 0, 0)
        step = build_eval_step(run).lower(params, batch()).compile()
        results.append(evaluate(step, state, [batch(), batch()]))
        temporary_bytes.append(step.memory_analysis().temp_size_in_bytes)
    whole, parted = results
    assert parted["eval/tokens"] == whole["eval/tokens"]
    assert parted["eval/loss_nats"] == pytest.approx(whole["eval/loss_nats"], rel=1e-6)
    assert temporary_bytes[1] < temporary_bytes[0] / 3


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [((1, -1, 1), 4), ((-1, 2, 2), 8), ((2, 1, -1), 16), ((4, 2, 1), 4)],
)
def test_rows_of_a_device_in_training_follow_from_its_mesh(mesh, rows):
    values = {"mesh": dict(zip(("replica", "fsdp", "tensor"), mesh, strict=True))}
    config = values | {"data": {"batch": 128}, "accumulation": 4}
    assert rows_in_training({"config": config, "devices": 8}) == rows


@pytest.mark.parametrize(
    ("devices", "rows", "parts"), [(8, 4, 1), (2, 4, 4), (1, 4, 8), (1, 3, 16)]
)
def test_fewer_devices_read_a_batch_in_more_parts(devices, rows, parts):
    cfg = dataclasses.replace(run_in(1).cfg, accumulation=2)
    assert fit_parts(cfg, devices, rows).accumulation == parts
    with pytest.raises(ValueError, match="--rows"):
        fit_parts(cfg, devices, 0)

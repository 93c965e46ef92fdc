import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import debug
from jaxtrain.config.train_config import DataConfig, freeze
from jaxtrain.data.corpus import open_corpus
from jaxtrain.data.encoding.input_files import list_files
from jaxtrain.data.encoding.options import EncodeOptions
from jaxtrain.data.encoding.pipeline import encode
from jaxtrain.data.loader import build_eval_batches
from jaxtrain.data.tokenizer import build_tokenizer
from jaxtrain.evaluate import fit_accumulation, rows_in_training
from jaxtrain.training.evaluation import (
    build_byte_counter,
    build_eval_step,
    evaluate,
    warn_of_noise,
)
from jaxtrain.training.run import build_run
from jaxtrain.training.step import TrainState

BATCH = 32


@functools.cache
def run_in(parts):
    config = debug.get_config()
    config.update(accumulation=parts)
    config.data.batch = BATCH
    config.model.L = 1
    return build_run(freeze(config), jax.devices()[:2])


@functools.cache
def start_of(parts):
    """Returns the state and the compiled step that evaluates it in `parts` micro-batches."""
    run = run_in(parts)
    params = jax.jit(run_in(1).model.init)(jax.random.key(0))
    step = build_eval_step(run).lower(params, batch()).compile()
    return TrainState(0, params, (), 0, 0), step


def batch():
    """Ragged rows of documents, the last five only padding."""
    rng = np.random.default_rng(0)
    lengths = np.append(rng.integers(2, 34, BATCH - 5), [0] * 5)
    docs = np.where(np.arange(33) < lengths[:, None], 0, -1)
    tokens = rng.integers(0, 256, (BATCH, 33))
    return {"tokens": tokens.astype(np.int32), "docs": docs.astype(np.int32)}


def test_evaluating_in_microbatches_gives_the_same_loss_in_less_memory():
    results, temporary_bytes = [], []
    for parts in (1, 8):
        state, step = start_of(parts)
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
def test_rows_per_device_in_training_follow_from_the_stored_mesh(mesh, rows):
    values = {"mesh": dict(zip(("replica", "fsdp", "tensor"), mesh, strict=True))}
    config = values | {"data": {"batch": 128}, "accumulation": 4}
    assert rows_in_training({"config": config, "devices": 8}) == rows


@pytest.mark.parametrize(
    ("devices", "rows", "parts"), [(8, 4, 1), (2, 4, 4), (1, 4, 8), (1, 3, 16)]
)
def test_fewer_devices_evaluate_in_more_microbatches(devices, rows, parts):
    cfg = dataclasses.replace(run_in(1).cfg, accumulation=2)
    assert fit_accumulation(cfg, devices, rows).accumulation == parts
    with pytest.raises(ValueError, match="--rows"):
        fit_accumulation(cfg, devices, 0)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A function (texts, tokenizer) -> (config, corpus of these documents)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def build(texts, tokenizer="bytes"):
        (tmp_path / "texts").mkdir()
        for i, text in enumerate(texts):
            (tmp_path / "texts" / f"{i:04}.txt").write_text(text)
        files = list_files(str(tmp_path / "texts"), exclude=tmp_path / "out")
        encode(files, tmp_path / "out", EncodeOptions(tokenizer))
        cfg = DataConfig(shards=str(tmp_path / "out"), batch=BATCH, seq_len=32)
        return cfg, open_corpus(cfg, "train", 50_304, tmp_path)

    return build


def evaluated(cfg, corpus, counted=True):
    (state, step), mesh = start_of(1), run_in(1).mesh
    batches = build_eval_batches(cfg, corpus, mesh)
    counter = build_byte_counter(corpus, mesh) if counted else None
    return evaluate(step, state, batches, counter)


@pytest.mark.parametrize("size", [1, 600])
def test_bits_per_byte_of_a_small_text_are_its_nats_in_bits(corpus, size):
    """One document: the token that starts it, then targets that are each a byte."""
    cfg, held_out = corpus([("The quick brown fox jumps over the lazy dog. " * 20)[:size]])
    metrics = evaluated(cfg, held_out)
    assert metrics["eval/tokens"] == size
    assert metrics["eval/bits_per_byte"] == pytest.approx(metrics["eval/loss_nats"] / np.log(2))


def test_a_token_that_starts_a_document_adds_nats_and_no_bytes(corpus):
    cfg, held_out = corpus(["abcdefg"] * 50)  # 400 tokens; targets: 350 letters, 49 starts
    metrics = evaluated(cfg, held_out)
    assert metrics["eval/tokens"] == 399
    bits = metrics["eval/loss_nats"] / np.log(2) * 399 / 350
    assert metrics["eval/bits_per_byte"] == pytest.approx(bits)


def test_the_loss_is_bitwise_the_same_with_and_without_the_bytes(corpus):
    cfg, held_out = corpus(["abcdefg é" * 9] * 50)
    with_bytes, without = (evaluated(cfg, held_out, counted) for counted in (True, False))
    assert "eval/bits_per_byte" in with_bytes and "eval/bits_per_byte" not in without
    assert with_bytes["eval/loss_nats"] == without["eval/loss_nats"]


def test_the_byte_count_of_a_batch_excludes_padding(corpus):
    texts = ["Hello, wörld! 你好 🦊", "The quick brown fox"]
    _, held_out = corpus(texts, "gpt2")
    tokenizer = build_tokenizer("gpt2")
    ids = np.concatenate([tokenizer.encode(text) for text in texts]).astype(np.int32)
    tokens = np.append(np.append(tokenizer.eot, ids), [ids[0]] * 5)  # the last 5 are padding
    docs = np.append(np.zeros(len(ids) + 1), [-1] * 5).astype(np.int32)
    count = build_byte_counter(held_out, run_in(1).mesh)
    batch = {"tokens": np.stack([tokens] * 2), "docs": np.stack([docs] * 2)}
    assert int(count(batch)) == 2 * sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(("tokens", "warns"), [(999, True), (1_000, False)])
def test_few_held_out_tokens_give_a_warning(tokens, warns):
    assert bool(warn_of_noise({"eval/tokens": tokens})) == warns

"""Records both sides of a tiny config in this process, for the tests of crosscheck."""

import dataclasses
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import torch

from configs import crosscheck_gpt2, crosscheck_llama
from jaxtrain.config.train_config import freeze
from jaxtrain.crosscheck import jax_train, torch_data, torch_train
from jaxtrain.crosscheck.tolerances import fixed_tolerance
from jaxtrain.crosscheck.trace import batches_of, read_trace
from jaxtrain.data.corpus import open_corpus
from jaxtrain.training.run import build_run
from jaxtrain.training.step import init_state

CONFIGS = {"gpt2": crosscheck_gpt2, "llama": crosscheck_llama}


@pytest.fixture(autouse=True)
def one_thread_and_old_x64_setting():
    """Runs torch on one thread, which is faster for small matrices; restores JAX's x64 setting."""
    threads, wide = torch.get_num_threads(), jax.config.jax_enable_x64
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    jax.config.update("jax_enable_x64", wide)


def small_config(model, folder, text, precision="float64", steps=3, data=None, **optim):
    """Returns a crosscheck config that compiles in seconds; sets jax_enable_x64 for float64."""
    config = CONFIGS[model].get_config()
    config.workdir, config.steps, config.data.text = str(folder), steps, str(text)
    config.model.update(D=32, K=8, F=48, dtype=precision)
    config.data.update({"batch": 4, "seq_len": 24} | (data or {}))
    config.optim.update({"ns_dtype": precision} | optim)
    config.compile_cache = ""
    jax.config.update("jax_enable_x64", precision == "float64")
    return freeze(config)


STEPS = {}  # compiled steps by the fields in which these tests' programs differ


def record_jax(cfg, path, measure_rounding=False, **options):
    """Returns (Start, trace of the jaxtrain side). Runs with the same settings share a program."""
    start, key = draw_start(cfg, read_data=True), (cfg.model, cfg.optim, cfg.data)
    if key not in STEPS:
        STEPS[key] = jax_train.build_traced_step(start.run)
    with mock.patch.object(jax_train, "build_traced_step", lambda run: STEPS[key]):
        jax_train.record(start, cfg.steps, path, measure_rounding=measure_rounding, **options)
    return start, read_trace(path)


def one_layer(cfg):
    """Returns a config of one layer, which compiles in two thirds of the time of two layers."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, L=1))


def draw_start(cfg, read_data=False):
    """Returns what build_start does, with weights drawn here: the model's own take 3 s to compile.

    Gains are near 1 and biases are 0.
    """
    run, rng = build_run(cfg, jax.devices()[:1]), np.random.default_rng(cfg.seed)

    def draw(path, x):
        spread = 0.0 if path[-1].key in ("b", "bias") else 0.1
        middle = 1.0 if path[-1].key == "gain" else 0.0
        w = middle + spread * rng.normal(size=x.shape)
        return w.astype(np.float32).astype(x.dtype)  # exact in a file of float32

    weights = jax.tree_util.tree_map_with_path(draw, run.model.shapes)
    params = jax.tree.map(jax.numpy.array, weights)  # copies, which init_state donates
    state = init_state(run.model, run.optimizer, run.mesh, params)
    corpus = None
    if read_data:
        corpus = open_corpus(cfg.data, "train", cfg.model.V, Path(cfg.workdir))
    return jax_train.Start(run, state, weights, corpus)


def record_torch(start, path, cfg=None, batches=None):
    """Returns the trace of the PyTorch side, trained on the batches of another trace if given."""
    cfg = cfg or start.run.cfg
    paths = [shard.path for shard in start.corpus.shards]
    own = torch_data.shard_batches(paths, cfg.data.batch, cfg.data.seq_len, cfg.seed)
    batches = batches_of(batches) if batches else own
    torch_train.record(cfg, cfg.steps, path, start.weights, batches)
    return read_trace(path)


def median_share_of_formula(comparison):
    """Returns the median of the measured tolerances over those of the formula."""
    precision, found = comparison.precision, comparison.differences.values()
    differences = [d for step in found for d in step if d.tolerance]
    return np.median(
        [d.tolerance / fixed_tolerance(precision, d.quantity, d.step) for d in differences]
    )

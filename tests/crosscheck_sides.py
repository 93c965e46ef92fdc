"""Records both sides of a tiny config in this process, for the tests of crosscheck."""

import contextlib
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import torch

from configs import crosscheck_gpt2, crosscheck_llama
from jaxtrain.config.train_config import freeze
from jaxtrain.crosscheck import jax_train, rounding, torch_data, torch_train
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


BUILT = {}  # by program_key


def program_key(cfg):
    """Returns the fields in which these tests' compiled programs and initial states differ."""
    return cfg.model, cfg.optim, cfg.data.batch, cfg.data.seq_len, cfg.seed, cfg.weights


@contextlib.contextmanager
def programs_built_once():
    """Lets recordings with the same config share compiled programs, for all tests of a process."""
    run_key = lambda run: program_key(run.cfg)
    parts = (
        (jax_train, "build_traced_step", run_key),
        (rounding, "build_traced_step", run_key),
        (rounding, "build_forward_backward_in_other_precision", program_key),
        (jax_train, "initial_state", run_key),
    )

    def once(module, name, key):
        build = getattr(module, name)

        def find(argument):
            place = module, name, key(argument)
            if place not in BUILT:
                BUILT[place] = build(argument)
            return BUILT[place]

        return mock.patch.object(module, name, find)

    with contextlib.ExitStack() as patches:
        for part in parts:
            patches.enter_context(once(*part))
        yield


def record_jax(cfg, path, measure_rounding=False, **options):
    """Returns (Start, trace of the jaxtrain side)."""
    with programs_built_once():
        start = jax_train.build_start(cfg)
        jax_train.record(start, cfg.steps, path, measure_rounding=measure_rounding, **options)
    return start, read_trace(path)


def draw_start(cfg, read_data=False):
    """Returns what build_start does, with weights drawn here: the model's own take 3 s to compile.

    Gains and biases are random, too, so that each has an effect.
    """
    run, rng = build_run(cfg, jax.devices()[:1]), np.random.default_rng(cfg.seed)

    def draw(path, x):
        middle = 1.0 if path[-1].key == "gain" else 0.0
        return (middle + 0.1 * rng.normal(size=x.shape)).astype(np.float32)

    weights = jax.tree_util.tree_map_with_path(draw, run.model.shapes)
    put = lambda w, x: jax.numpy.array(w, x.dtype)  # a copy, which init_state donates
    params = jax.tree.map(put, weights, run.model.shapes)
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

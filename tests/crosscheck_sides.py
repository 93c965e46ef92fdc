"""Records both sides of a tiny config in this process, for the tests of crosscheck."""

import jax
import pytest
import torch

from configs import crosscheck_gpt2, crosscheck_llama
from jaxtrain.config.train_config import freeze
from jaxtrain.crosscheck import jax_train, torch_data, torch_train
from jaxtrain.crosscheck.trace import batches_of, read_trace

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


def record_jax(cfg, path, measure_rounding=False, **options):
    """Returns (Start, trace of the jaxtrain side)."""
    start = jax_train.build_start(cfg)
    jax_train.record(start, cfg.steps, path, measure_rounding=measure_rounding, **options)
    return start, read_trace(path)


def record_torch(start, path, cfg=None, batches=None):
    """Returns the trace of the PyTorch side, trained on the batches of another trace if given."""
    cfg = cfg or start.run.cfg
    paths = [shard.path for shard in start.corpus.shards]
    own = torch_data.shard_batches(paths, cfg.data.batch, cfg.data.seq_len, cfg.seed)
    batches = batches_of(batches) if batches else own
    torch_train.record(cfg, cfg.steps, path, start.weights, batches)
    return read_trace(path)

"""Records both sides of a tiny config in this process, for the tests of crosscheck."""

import jax

from configs import crosscheck_gpt2, crosscheck_llama
from jaxtrain.config.train_config import freeze
from jaxtrain.crosscheck import jax_train, torch_data, torch_train
from jaxtrain.crosscheck.trace import batches_of, read_trace

CONFIGS = {"gpt2": crosscheck_gpt2, "llama": crosscheck_llama}


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


def record_jax(cfg, path, **options):
    """Returns (Start, trace of the jaxtrain side)."""
    start = jax_train.build_start(cfg)
    jax_train.record(start, cfg.steps, path, **options)
    return start, read_trace(path)


def record_torch(start, path, cfg=None, batches=None):
    """Returns the trace of the PyTorch side; batches: a trace that stores them."""
    cfg = cfg or start.run.cfg
    if batches is None:
        paths = [shard.path for shard in start.corpus.shards]
        batches = torch_data.shard_batches(paths, cfg.data.batch, cfg.data.seq_len, cfg.seed)
    else:
        batches = batches_of(batches)
    torch_train.record(cfg, cfg.steps, path, start.weights, batches)
    return read_trace(path)

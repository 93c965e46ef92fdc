r"""A tiny Llama with grouped queries, to compare with PyTorch: 125,248 parameters, untied head.

jaxtrain crosscheck run crosscheck_llama --precision=float64
"""

from configs import base


def get_config():
    config = base.get_config()
    config.workdir = "runs/crosscheck_llama"
    config.steps = 50
    config.model.update(L=2, D=64, H=4, G=2, K=16, F=176, V=256, dtype="float32")
    config.data.update(batch=8, seq_len=32)
    config.optim.update(ns_dtype="float32", weight_decay=0.1, warmup_steps=5)
    return config

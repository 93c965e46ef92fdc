r"""A tiny GPT-2 with a tied head, to compare with PyTorch: 118,528 parameters.

jaxtrain crosscheck run crosscheck_gpt2 --steps=50 --precision=float64
"""

from configs import base


def get_config():
    config = base.get_config()
    config.workdir = "runs/crosscheck_gpt2"
    config.steps = 50
    config.model.update(L=2, D=64, H=4, G=4, K=16, F=256, V=256, dtype="float32", tied=True)
    config.model.update(norm="layer", norm_eps=1e-5, bias=True, position="learned", positions=32)
    config.model.update(mlp="gelu")
    config.data.update(batch=8, seq_len=32)
    config.optim.update(ns_dtype="float32", weight_decay=0.1, warmup_steps=5)
    return config

r"""A tiny model that trains in seconds on any machine, for tests: 35,008 parameters.

jaxtrain train debug
"""

from configs import base


def get_config():
    config = base.get_config()
    config.workdir = "runs/debug"
    config.steps = 20
    config.log_every = 1
    config.save_every = 10
    config.model.update(L=2, D=32, H=4, G=2, K=8, F=64, V=256, qk_norm=True, dtype="float32")
    config.data.update(batch=8, seq_len=32)
    config.optim.update(warmup_steps=2)
    config.sample.tokens = 16
    return config

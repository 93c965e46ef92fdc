r"""A byte-level model that trains in minutes on 2 CPU cores: 3,541,760 parameters.

jaxtrain train quickstart
"""

from configs import base


def get_config():
    config = base.get_config()
    config.workdir = "runs/quickstart"
    config.steps = 200
    config.eval_every = 100
    config.eval_tokens = 65_536
    config.save_every = 50
    config.model.update(L=4, D=256, H=4, G=4, K=64, F=768, V=256, qk_norm=True, dtype="auto")
    config.data.update(batch=8, seq_len=256)
    config.optim.update(name="muon", learning_rate=0.02, adam_learning_rate=3e-3)
    return config

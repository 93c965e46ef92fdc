r"""A study of four optimizers that takes minutes on 2 CPU cores: 115,072 parameters.

jaxtrain study study_quick
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
    config = ConfigDict({"base": base.get_config(), "study": {"workdir": "runs/study_quick"}})
    run = config.base
    run.steps = 120
    run.save_every = 120
    run.keep_last = 1
    run.log_every = 10
    run.eval_every = 30
    run.eval_tokens = 16_384
    run.model.update(L=2, D=64, H=4, G=4, K=16, F=128, V=256, qk_norm=True, dtype="float32")
    run.data.update(batch=8, seq_len=64)
    run.optim.update(warmup_steps=10, weight_decay=0.1, momentum=0.9)
    run.sample.tokens = 0
    config.study.baseline = "muon"
    config.study.seeds = (1, 2, 3)
    config.study.contenders = ConfigDict(
        {
            "muon": {"optim": {"name": "muon"}},
            "accelerated_lmo": {"optim": {"name": "accelerated_lmo"}},
            "normuon": {"optim": {"name": "normuon"}},
            "adamw": {"optim": {"name": "adamw"}},
        }
    )
    rates = {"learning_rate": (0.02, 0.06), "adam_learning_rate": (0.01, 0.03)}
    config.study.grid = ConfigDict(
        {
            "muon": {"optim": rates},
            "accelerated_lmo": {"optim": rates},
            "normuon": {"optim": rates},
            "adamw": {"optim": {"adam_learning_rate": (0.003, 0.006, 0.012, 0.024)}},
        }
    )
    return config

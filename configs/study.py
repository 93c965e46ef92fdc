r"""Muon against AdamW, without and with heavy-tailed noise: 3,541,760 parameters.

About an hour on 2 CPU cores; two with two contenders more.

python -m jaxtrain.optim.study --config=configs/study.py
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config():
    config = ConfigDict({"base": quickstart.get_config(), "study": {"workdir": "runs/study"}})
    run = config.base
    run.steps = 150
    run.save_every = 150
    run.keep_last = 1
    run.eval_every = 30
    run.data.update(batch=8, seq_len=128)
    run.optim.update(warmup_steps=10, weight_decay=0.1)
    run.sample.tokens = 0
    config.study.baseline = "muon"
    config.study.seeds = (1, 2, 3, 4)
    config.study.conditions = ConfigDict(
        {
            "quiet": {},
            "heavy_tails": {"optim": {"noise_scale": 0.5, "noise_tail": 1.5}},
        }
    )
    config.study.contenders = ConfigDict(
        {
            "muon": {"optim": {"name": "muon"}},
            "adamw": {"optim": {"name": "adamw"}},
        }
    )
    config.study.grid = ConfigDict(
        {
            "muon": {
                "optim": {
                    "learning_rate": (0.01, 0.02, 0.04),
                    "adam_learning_rate": (0.004, 0.012),
                }
            },
            "adamw": {"optim": {"adam_learning_rate": (0.001, 0.002, 0.003, 0.004, 0.006, 0.008)}},
        }
    )
    return config

r"""A study of Muon, Muon with gradient transport and AdamW: 3,541,760 parameters.

It makes 66 runs, with and without heavy-tailed noise, in an hour or more on 2 CPU cores.

jaxtrain study study
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config():
    config = ConfigDict({"base": quickstart.get_config(), "study": {"workdir": "runs/study"}})
    run = config.base
    run.steps = 120
    run.model.dtype = "float32"  # so that every machine runs the same study
    run.save_every = 120
    run.keep_last = 1
    run.eval_every = 30
    run.eval_tokens = 24_576
    run.data.update(batch=4, seq_len=128)
    run.optim.update(warmup_steps=5, weight_decay=0.1)
    run.sample.tokens = 0
    config.study.baseline = "muon"
    config.study.seeds = (1, 2, 3)
    config.study.conditions = ConfigDict(
        {
            "quiet": {},
            "heavy_tails": {"optim": {"noise_scale": 0.5, "noise_tail": 1.5}},
        }
    )
    config.study.contenders = ConfigDict(
        {
            "muon": {"optim": {"name": "muon"}},
            "transport": {"optim": {"name": "accelerated_lmo"}},
            "adamw": {"optim": {"name": "adamw"}},
        }
    )
    tuned = {
        "learning_rate": (0.015, 0.03),
        "adam_learning_rate": (0.005, 0.015),
        "momentum": (0.85, 0.95),  # an untuned momentum would decide the comparison
    }
    config.study.grid = ConfigDict(
        {
            "muon": {"optim": tuned},
            "transport": {"optim": tuned},
            "adamw": {
                "optim": {
                    "adam_learning_rate": (0.001, 0.002, 0.004, 0.008),
                    "adam_b1": (0.85, 0.95),
                }
            },
        }
    )
    return config

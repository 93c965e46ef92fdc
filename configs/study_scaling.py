r"""Ranks optimizers by runs of 20 to 80 tokens a parameter, and compares with a published ranking.

python -m jaxtrain.study --config=configs/study_scaling.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
    config = ConfigDict({"base": base.get_config(), "study": {"workdir": "runs/study_scaling"}})
    run = config.base
    run.save_every = 1_000_000  # the last step only, of which runs of minutes need no more
    run.keep_last = 1
    run.log_every = 50
    run.eval_tokens = 262_144
    run.model.update(L=2, K=32, V=256, qk_norm=True, dtype="float32")
    run.data.update(batch=32, seq_len=128)
    run.optim.update(warmup_steps=50, weight_decay=0.1)
    run.sample.tokens = 0
    config.study.baseline = "muon"
    config.study.search = "coordinates"
    config.study.sizes = ConfigDict(
        {
            "0.1M": {"model": {"D": 64, "H": 2, "G": 2, "F": 128}},
            "0.3M": {"model": {"D": 96, "H": 3, "G": 3, "F": 288}},
            "0.5M": {"model": {"D": 128, "H": 4, "G": 4, "F": 384}},
        }
    )
    return config

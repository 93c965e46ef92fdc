r"""Five optimizers on runs of 20 to 80 tokens a parameter, against a published ranking.

The models have 115,072, 289,376 and 492,288 parameters, all of which count for the horizons. The
smallest is there to tune: it has 12 runs for each contender, the next one 3, starting from these
settings, and the settings of 300k-1x are used at its longer horizons and at 500k. 500k has one
horizon only, since 2x and 4x would take longer than all else together; add them to
study.horizons and study.budget, and the same folder continues.

python -m jaxtrain.study --config=configs/study_scaling.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
    config = ConfigDict({"base": base.get_config(), "study": {"workdir": "runs/study_scaling"}})
    run = config.base
    run.save_every = 1_000_000  # the last step only: a run that is stopped starts again
    run.keep_last = 1
    run.log_every = 50
    run.eval_tokens = 262_144
    run.model.update(L=2, H=3, G=3, K=32, V=256, qk_norm=True, dtype="float32")
    run.model.update(D=96, F=288)
    run.data.update(batch=32, seq_len=128)
    run.optim.update(warmup_steps=50, weight_decay=0.1)
    run.sample.tokens = 0
    study = config.study
    study.baseline = "muon"
    study.seeds = (1, 2, 3)
    study.sizes = ConfigDict(
        {
            "100k": {"model": {"D": 64, "H": 2, "G": 2, "F": 128}},
            "300k": {"model": {"D": 96, "H": 3, "G": 3, "F": 288}},
            "500k": {"model": {"D": 128, "H": 4, "G": 4, "F": 384}},
        }
    )
    study.horizons = ConfigDict({"100k": (1,), "300k": (1, 2, 4), "500k": (1,)})
    study.search = "coordinates"
    study.budget = (12, 3, 0, 0, 0)
    names = ("muon", "normuon", "muon_h", "adam_h", "adamw")
    study.contenders = ConfigDict({name: {"optim": {"name": name}} for name in names})
    decay, beta = (0.05, 0.1, 0.2), (0.9, 0.95)
    auxiliary = {"adam_learning_rate": (0.005, 0.01, 0.02)}
    spectral = {"learning_rate": (0.015, 0.03, 0.06), **auxiliary, "weight_decay": decay}
    kept_norm = {"learning_rate": (0.01, 0.02, 0.04), **auxiliary, "weight_decay": decay}
    study.grid = ConfigDict(
        {
            "muon": {"optim": {**spectral, "momentum": beta}},
            "normuon": {"optim": {**spectral, "momentum": beta}},
            "muon_h": {"optim": {**kept_norm, "momentum": beta}},
            "adam_h": {"optim": {**kept_norm, "adam_b2": beta}},
            "adamw": {
                "optim": {
                    "adam_learning_rate": (0.0025, 0.005, 0.01),
                    "weight_decay": decay,
                    "adam_b1": beta,
                    "adam_b2": beta,
                }
            },
        }
    )
    # Steps to a loss of 3.28 in modded-nanogpt's records/track_3_optimization/README.md (2026-08),
    # of its results 36, 10, 37, 4 and 2.
    study.published = ConfigDict(
        {"muon": 3_250, "normuon": 3_250, "muon_h": 3_250, "adam_h": 4_875, "adamw": 5_625}
    )
    return config

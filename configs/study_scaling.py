r"""A study of nine optimizers at 20 to 80 tokens a parameter, against a published ranking.

It makes at most 270 runs of models with 115,136, 289,376 and 492,288 parameters, with embedding and
head, on Python's standard library: 11.5M training tokens, which the longest run reads twice. Two
processes on 2 cores need about 11 hours: a token takes 21, 39 and 65 us of a core (AMD EPYC with
AVX2; SOAP takes 6 % longer), and start, compilation and evaluation about 12 s a run. The results
are written after every size and horizon. Start it once for each core:

taskset -c 0 jaxtrain study study_scaling
taskset -c 1 jaxtrain study study_scaling

The smallest size is there to tune: each contender has 12 runs for four fields. 300k-1x starts from
these settings and has 3 runs, and its settings are used at longer horizons and at 500k.
500k has one horizon, because 2x and 4x would take longer than all else together. Add them to
study.horizons and to study.budget, and the runs in the folder are used again.

muon_polar is Muon with the polynomials of Polar Express instead of Jordan's.
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
    config = ConfigDict({"base": base.get_config(), "study": {"workdir": "runs/study_scaling"}})
    run = config.base
    run.save_every = 1_000
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
    study.contenders = ConfigDict(
        {
            "muon": {"optim": {"name": "muon"}},
            "muon_polar": {"optim": {"name": "muon", "ns_coefficients": "polar_express"}},
            "normuon": {"optim": {"name": "normuon"}},
            "soap": {"optim": {"name": "soap"}},
            "soap_muon": {"optim": {"name": "soap_muon"}},
            "muown": {"optim": {"name": "muown", "scale": "match_rms"}},
            "muon_h": {"optim": {"name": "muon_h"}},
            "adam_h": {"optim": {"name": "adam_h"}},
            "adamw": {"optim": {"name": "adamw"}},
        }
    )
    decay, beta = {"weight_decay": (0.05, 0.1, 0.2)}, (0.9, 0.95)
    adam = {"adam_learning_rate": (0.0025, 0.005, 0.01), **decay}  # of all parameters
    auxiliary = {"adam_learning_rate": (0.005, 0.01, 0.02), **decay}  # of those that are no matrix
    spectral = {"learning_rate": (0.015, 0.03, 0.06), **auxiliary, "momentum": beta}
    rows = {"learning_rate": (0.003, 0.006, 0.012), **auxiliary}  # of directions and lengths
    share = {"learning_rate": (0.01, 0.02, 0.04), **auxiliary}
    study.grid = ConfigDict(
        {
            "muon": {"optim": spectral},
            "muon_polar": {"optim": spectral},
            "normuon": {"optim": spectral},
            "soap": {"optim": {**adam, "momentum": beta, "precondition_decay": beta}},
            "soap_muon": {"optim": spectral},
            "muown": {"optim": {**rows, "momentum": beta}},
            "muon_h": {"optim": {**share, "momentum": beta}},
            "adam_h": {"optim": {**share, "adam_b2": beta}},
            "adamw": {"optim": {**adam, "adam_b1": beta, "adam_b2": beta}},
        }
    )
    # Steps to a loss of 3.28 in modded-nanogpt's records/track_3_optimization/README.md (2026-08).
    study.published = ConfigDict(
        {
            "soap_muon": 2_750,  # result 44, with further techniques
            "soap": 3_125,  # 27, with matrices that keep their norms
            "muon": 3_250,  # 36
            "normuon": 3_250,  # 10
            "muon_h": 3_250,  # 37
            "muown": 3_075,  # 23, with another schedule
            "adam_h": 4_875,  # 4
            "adamw": 5_625,  # 2, "most likely undertuned"
        }
    )
    return config

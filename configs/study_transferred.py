r"""A study of nine optimizers at 289,376 parameters, with settings that were tuned at 115,136.

Each contender's settings are those that study_scaling's search of 12 runs found in its smallest
cell (docs/study_scaling.csv). They are not tuned again, which is how large runs are made, and which
also tests how well they transfer. Each contender has 3 runs of 20 tokens a parameter, on seeds that
are paired. A run takes about 4 minutes of a core (AMD EPYC with AVX2). Start it once for each core:

taskset -c 0 python -m jaxtrain.study --config=configs/study_transferred.py
taskset -c 1 python -m jaxtrain.study --config=configs/study_transferred.py
"""

from ml_collections import ConfigDict

from configs import study_scaling

# contender -> the setting with the lowest held-out loss in cell 100k-1x
TUNED = {
    "muon": {"learning_rate": 0.015, "adam_learning_rate": 0.04, "momentum": 0.9},
    "muon_polar": {"learning_rate": 0.015, "adam_learning_rate": 0.02, "momentum": 0.9},
    "normuon": {"learning_rate": 0.015, "adam_learning_rate": 0.04, "momentum": 0.9},
    "soap": {"adam_learning_rate": 0.01, "momentum": 0.6, "precondition_decay": 0.9},
    "soap_muon": {"learning_rate": 0.015, "adam_learning_rate": 0.02, "momentum": 0.9},
    "muown": {"learning_rate": 0.012, "adam_learning_rate": 0.04, "momentum": 0.9},
    "muon_h": {"learning_rate": 0.02, "adam_learning_rate": 0.02, "momentum": 0.9},
    "adam_h": {"learning_rate": 0.01, "adam_learning_rate": 0.04, "adam_b2": 0.9},
    "adamw": {"adam_learning_rate": 0.01, "adam_b1": 0.8, "adam_b2": 0.9},
}
WEIGHT_DECAY = {
    "muon": 0.05,
    "muon_polar": 0.05,
    "normuon": 0.05,
    "soap": 0.1,
    "soap_muon": 0.1,
    "muown": 0.1,
    "muon_h": 0.0125,
    "adam_h": 0.05,
    "adamw": 0.1,
}


def get_config():
    config = study_scaling.get_config()
    study = config.study
    study.workdir = "runs/study_transferred"
    study.sizes = ConfigDict({"300k": study.sizes["300k"]})
    study.horizons = ConfigDict({"300k": (1,)})
    study.search, study.budget, study.tune_adam = "grid", (0,), False
    for name, contender in study.contenders.items():
        contender.optim.update(TUNED[name], weight_decay=WEIGHT_DECAY[name])
    study.grid = ConfigDict({name: {} for name in study.contenders})
    return config

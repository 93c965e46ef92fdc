r"""A study of nine optimizers at 289,376 parameters, with settings that were tuned at 115,136.

Each contender's settings are those that study_scaling's search of 12 runs found in its smallest
cell (docs/study_scaling.csv). They are not tuned again, as in large runs, which tests how well they
transfer. Each contender has 3 runs of 20 tokens a parameter, on paired seeds. A run takes about
5.5 minutes of a core (AMD EPYC with AVX2, both cores busy). Start it once for each core:

taskset -c 0 jaxtrain study study_transferred
taskset -c 1 jaxtrain study study_transferred
"""

from ml_collections import ConfigDict

from configs import study_scaling


def get_config():
    config = study_scaling.get_config()
    study = config.study
    study.workdir = "runs/study_transferred"
    study.sizes = ConfigDict({"300k": study.sizes["300k"]})
    study.horizons = ConfigDict({"300k": (1,)})
    study.search, study.budget, study.tune_adam = "grid", (0,), False
    study.grid = ConfigDict(dict.fromkeys(study.contenders, {}))
    # The settings with the lowest held-out loss in cell 100k-1x.
    muon = {"learning_rate": 0.015, "momentum": 0.9, "adam_learning_rate": 0.04}
    muon |= {"weight_decay": 0.05}
    best = study.contenders
    best.muon.optim.update(muon)
    best.muon_polar.optim.update(muon, adam_learning_rate=0.02)
    best.normuon.optim.update(muon)
    best.soap_muon.optim.update(muon, adam_learning_rate=0.02, weight_decay=0.1)
    best.muown.optim.update(muon, learning_rate=0.012, weight_decay=0.1)
    best.muon_h.optim.update(muon, learning_rate=0.02, adam_learning_rate=0.02)
    best.muon_h.optim.weight_decay = 0.0125
    best.adam_h.optim.update(learning_rate=0.01, adam_learning_rate=0.04, adam_b2=0.9)
    best.adam_h.optim.weight_decay = 0.05
    best.soap.optim.update(adam_learning_rate=0.01, momentum=0.6, precondition_decay=0.9)
    best.soap.optim.weight_decay = 0.1
    best.adamw.optim.update(adam_learning_rate=0.01, adam_b1=0.8, adam_b2=0.9, weight_decay=0.1)
    return config

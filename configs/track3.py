r"""Track 3 of modded-nanogpt: tuned Muon against NorMuon at their published settings.

    jaxtrain study --config=configs/track3.py

It needs data/fineweb10B, as configs/gpt_track3.py does.
Contenders are not tuned here: their settings are those of results 36 and 10.
"""

from ml_collections import ConfigDict

from configs import gpt_track3


def get_config():
    config = ConfigDict({"base": gpt_track3.get_config(), "study": {"workdir": "runs/track3"}})
    config.study.baseline = "muon"
    config.study.target = 3.28
    config.study.tune_adam = False
    config.study.seeds = tuple(range(1, 11))
    normuon = {"name": "normuon", "learning_rate": 0.035, "weight_decay": 0.025}
    normuon |= {"embedding_learning_rate": 0.3, "head_learning_rate": 1 / 320}
    normuon |= {"vector_learning_rate": 0.01, "decay_groups": "matrices"}
    normuon["total_steps"] = 3_300  # the published run ends 50 steps before its schedule
    config.study.contenders = ConfigDict({"muon": {}, "normuon": {"optim": normuon}})
    config.study.grid = ConfigDict({"muon": {}, "normuon": {}})
    return config

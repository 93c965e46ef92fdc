"""The defaults of jaxtrain/config.py, for the other files to start from."""

from jaxtrain import config


def get_config():
    return config.to_config_dict(config.TrainConfig())

"""The defaults of jaxtrain/config/train_config.py, for the other files to start from."""

from jaxtrain.config import train_config as config


def get_config():
    return config.to_config_dict(config.TrainConfig())

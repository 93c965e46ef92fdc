"""The default config of jaxtrain/config/train_config.py, from which all other configs start."""

from jaxtrain.config import train_config as config


def get_config():
    return config.to_config_dict(config.TrainConfig())

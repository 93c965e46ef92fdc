r"""GPT-2 small: 124,475,904 parameters, vocabulary padded to 50304.

jaxtrain train gpt_124m --data.shards=DIR
"""

from configs import gpt2


def get_config():
    config = gpt2.get_config()
    config.workdir = "runs/gpt_124m"
    config.model.update(L=12, D=768, H=12, G=12, K=64, F=3_072)
    config.accumulation = 16
    return config

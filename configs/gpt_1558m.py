r"""GPT-2 XL: 1,557,686,400 parameters, vocabulary padded to 50304.

jaxtrain train gpt_1558m --data.shards=DIR
"""

from configs import gpt2


def get_config():
    config = gpt2.get_config()
    config.workdir = "runs/gpt_1558m"
    config.model.update(L=48, D=1_600, H=25, G=25, K=64, F=6_400)

    config.accumulation = 128
    return config

r"""GPT-2 large: 774,090,240 parameters, vocabulary padded to 50304.

jaxtrain train gpt_774m --data.shards=DIR
"""

from configs import gpt2


def get_config():
    config = gpt2.get_config()
    config.workdir = "runs/gpt_774m"
    config.model.update(L=36, D=1_280, H=20, G=20, K=64, F=5_120)

    config.accumulation = 64
    return config

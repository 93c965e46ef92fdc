r"""GPT-2 medium: 354,871,296 parameters, vocabulary padded to 50304.

jaxtrain train gpt_350m --data.shards=DIR
"""

from configs import gpt2


def get_config():
    config = gpt2.get_config()
    config.workdir = "runs/gpt_350m"
    config.model.update(L=24, D=1_024, H=16, G=16, K=64, F=4_096)
    config.accumulation = 32
    return config

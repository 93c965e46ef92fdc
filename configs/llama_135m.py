r"""The shape of SmolLM2-135M: 134,515,008 parameters, GQA 9:3, tied head.

    jaxtrain train llama_135m --data.shards=DIR

Source: Allal et al. 2025, https://arxiv.org/abs/2502.02737
"""

from configs import llama


def get_config():
    config = llama.get_config()
    config.workdir = "runs/llama_135m"
    config.model.update(L=30, D=576, H=9, G=3, K=64, F=1_536, V=49_152)
    config.model.update(tied=True, rope_theta=100_000.0, norm_eps=1e-5)
    config.data.update(batch=256, seq_len=2_048)
    config.accumulation = 16
    return config

r"""Llama with GQA 16:4: 1,378,461,696 parameters, vocabulary padded to 50304.

    python -m jaxtrain.train --config=configs/llama_1400m.py --config.data.shards=DIR

One step on a CPU, to see it run (needs 20 GiB):

    python -m jaxtrain.train --config=configs/llama_1400m.py --config.steps=1 \\
        --config.accumulation=1 --config.data.batch=1 --config.data.seq_len=64 \\
        --config.data.text=README.md
"""

from configs import llama


def get_config():
    config = llama.get_config()
    config.workdir = "runs/llama_1400m"
    config.model.update(L=26, D=2_048, H=16, G=4, K=128, F=5_632, V=50_304)
    config.data.update(batch=256, seq_len=2_048, tokenizer="gpt2")
    # With 8, jaxtrain.plan computes 33.6 GiB of an A40's memory, not 26.8, for 1 % more speed.
    config.accumulation = 16
    return config
